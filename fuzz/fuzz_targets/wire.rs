//! The server's socket: any bytes are requests or an error, and the connection ends.
#![no_main]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use peel::protocol::{Request, Response};
use peel::wire::Connection;

/// Less than a socket buffers, since nobody reads while the bytes are written.
const MAX: usize = 64 << 10;

fuzz_target!(|data: &[u8]| {
    let Some(data) = Some(data).filter(|data| data.len() <= MAX) else {
        return;
    };
    let connect = || {
        let (mut left, right) = UnixStream::pair().expect("a socket pair");
        left.write_all(data).expect("room in the socket");
        Connection::new(right, Some(Duration::from_secs(5))).expect("a connection")
    };
    let mut connection = connect();
    while let Ok((request, fd)) = connection.receive::<Request>() {
        assert!(fd.is_none());
        if let Request::Mount(mount) = request
            && let Ok(name) = mount.image.parse()
        {
            let _ = mount.load_request(name);
        }
    }
    let mut connection = connect();
    while connection.receive::<Response>().is_ok() {}
});
