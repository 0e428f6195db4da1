//! Messages over a unix socket: a length (four bytes, little endian), then that many bytes of JSON, and at most one file
//! descriptor beside them (SCM_RIGHTS). Both the server and its clients use it; what the messages mean is in
//! [`crate::protocol`].
//!
//! A peer is a process of the same user (root), but a length is checked all the same before memory is taken for it.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest message in bytes. A configuration of an image may be 4 MiB, which JSON escapes can double.
pub const MESSAGE_MAX: usize = 16 << 20;

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The peer closed the connection between two messages.
    #[error("the other side closed the connection")]
    Closed,
    /// The connection broke, or nothing arrived within the time limit.
    #[error("connection failed: {0}")]
    Io(#[from] io::Error),
    /// A message is longer than [`MESSAGE_MAX`].
    #[error("message of {0} bytes; at most {MESSAGE_MAX} are allowed")]
    TooLong(usize),
    /// A message is not what the protocol allows here.
    #[error("message not understood: {0}")]
    Malformed(#[from] serde_json::Error),
}

impl Error {
    /// Whether the peer went away (rather than said something wrong), so that trying again makes sense.
    pub fn is_disconnect(&self) -> bool {
        match self {
            Self::Closed => true,
            Self::Io(error) => matches!(
                error.kind(),
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof
            ),
            Self::TooLong(_) | Self::Malformed(_) => false,
        }
    }
}

/// One end of a connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
}

impl Connection {
    /// A connection over `stream`; a send or a receive that gets nowhere for `deadline` fails.
    pub fn new(stream: UnixStream, deadline: Option<Duration>) -> io::Result<Self> {
        stream.set_write_timeout(deadline)?;
        stream.set_read_timeout(deadline)?;
        Ok(Self { stream })
    }

    /// Changes how long a receive waits; `None` waits for ever.
    pub fn set_receive_deadline(&self, deadline: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(deadline)
    }

    /// Sends one message, with a descriptor beside it if there is one.
    pub fn send<M: Serialize>(&mut self, message: &M, fd: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        let frame = encode(message)?;
        let mut rest = frame.as_slice();
        if let Some(fd) = fd {
            let fds = [fd];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            ancillary.push(SendAncillaryMessage::ScmRights(&fds));
            let sent = rustix::io::retry_on_intr(|| {
                rustix::net::sendmsg(
                    &self.stream,
                    &[IoSlice::new(rest)],
                    &mut ancillary,
                    SendFlags::NOSIGNAL,
                )
            })
            .map_err(io::Error::from)?;
            rest = rest.get(sent..).unwrap_or_default();
        }
        Ok(self.stream.write_all(rest)?)
    }

    /// Receives one message, and the descriptor that came beside it.
    pub fn receive<M: DeserializeOwned>(&mut self) -> Result<(M, Option<OwnedFd>), Error> {
        let mut header = [0; 4];
        let mut filled = 0;
        let mut fd = None;
        while let Some(space) = header.get_mut(filled..).filter(|space| !space.is_empty()) {
            match self.receive_some(space, &mut fd)? {
                0 if filled == 0 => return Err(Error::Closed),
                0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                received => filled += received,
            }
        }
        let length = usize::try_from(u32::from_le_bytes(header)).unwrap_or(usize::MAX);
        if length > MESSAGE_MAX {
            return Err(Error::TooLong(length));
        }
        let mut body = Vec::new();
        let limit = u64::try_from(length).unwrap_or(u64::MAX);
        if (&self.stream).take(limit).read_to_end(&mut body)? != length {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok((serde_json::from_slice(&body)?, fd))
    }

    /// Reads the first bytes of a message: a descriptor arrives with the byte it was sent with.
    fn receive_some(&self, space: &mut [u8], fd: &mut Option<OwnedFd>) -> Result<usize, Error> {
        let mut control = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut control);
        let received = rustix::io::retry_on_intr(|| {
            let mut iov = [IoSliceMut::new(space)];
            rustix::net::recvmsg(&self.stream, &mut iov, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        })
        .map_err(io::Error::from)?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                // More than one is not part of the protocol; those that nobody takes are closed here.
                for received in fds {
                    *fd = Some(received);
                }
            }
        }
        Ok(received.bytes)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// A message with its length before it.
fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, Error> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, message)?;
    let length = frame.len() - 4;
    let header = u32::try_from(length)
        .ok()
        .filter(|_| length <= MESSAGE_MAX)
        .ok_or(Error::TooLong(length))?;
    if let Some(start) = frame.get_mut(..4) {
        start.copy_from_slice(&header.to_le_bytes());
    }
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pair() -> (Connection, Connection) {
        let (left, right) = UnixStream::pair().unwrap();
        let deadline = Some(Duration::from_secs(10));
        (
            Connection::new(left, deadline).unwrap(),
            Connection::new(right, deadline).unwrap(),
        )
    }

    proptest! {
        #[test]
        fn messages_round_trip(messages in proptest::collection::vec((".{0,2000}", any::<bool>()), 1..20)) {
            let (mut left, mut right) = pair();
            let sent = messages.clone();
            let sender = std::thread::spawn(move || {
                let file = std::fs::File::open("/dev/null").unwrap();
                for (text, with_fd) in &sent {
                    left.send(text, with_fd.then(|| file.as_fd())).unwrap();
                }
            });
            for (text, with_fd) in &messages {
                let (received, fd) = right.receive::<String>().unwrap();
                prop_assert_eq!(&received, text);
                prop_assert_eq!(fd.is_some(), *with_fd);
            }
            sender.join().unwrap();
            prop_assert!(matches!(right.receive::<String>(), Err(Error::Closed)));
        }

        #[test]
        fn garbage_is_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let (left, mut right) = pair();
            (&left.stream).write_all(&bytes).unwrap();
            drop(left);
            prop_assert!(right.receive::<crate::protocol::Request>().is_err());
        }
    }

    #[test]
    fn a_length_that_lies_takes_no_memory() {
        let (left, mut right) = pair();
        (&left.stream).write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(matches!(right.receive::<String>(), Err(Error::TooLong(_))));
    }

    #[test]
    fn a_descriptor_arrives_as_the_same_file() {
        let (mut left, mut right) = pair();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"x").unwrap();
        left.send(&1_u8, Some(file.as_fd())).unwrap();
        let (_, fd) = right.receive::<u8>().unwrap();
        let stat = rustix::fs::fstat(fd.unwrap()).unwrap();
        assert_eq!(
            (stat.st_ino, stat.st_size),
            (rustix::fs::fstat(&file).unwrap().st_ino, 1)
        );
    }
}
