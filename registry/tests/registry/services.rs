//! Debian's docker-registry and nginx, started for one test and ended with it, also when the test panics.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a service may take to listen.
const START: Duration = Duration::from_secs(60);

/// A running program and its files.
pub(crate) struct Service {
    child: Child,
    /// `127.0.0.1:PORT`
    pub(crate) address: String,
    pub(crate) dir: tempfile::TempDir,
}

impl Drop for Service {
    fn drop(&mut self) {
        // Nothing can be done about a process that is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

fn start(mut command: Command, address: String, dir: tempfile::TempDir) -> Service {
    let log = dir.path().join("log");
    let output = File::create(&log).unwrap();
    let program = command.get_program().to_owned();
    let child = command
        .stdin(Stdio::null())
        .stdout(output.try_clone().unwrap())
        .stderr(output)
        .spawn()
        .unwrap_or_else(|error| panic!("{program:?} cannot be started: {error}; install its Debian package"));
    let mut service = Service { child, address, dir };
    let deadline = Instant::now() + START;
    while TcpStream::connect(&service.address).is_err() {
        let ended = service.child.try_wait().unwrap();
        let said = || std::fs::read_to_string(&log).unwrap_or_default();
        assert!(ended.is_none(), "{program:?} ended: {ended:?}\n{}", said());
        assert!(
            Instant::now() < deadline,
            "{program:?} does not listen\n{}",
            said()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    service
}

/// An empty docker-registry without TLS and login.
pub(crate) fn docker_registry() -> Service {
    let dir = tempfile::tempdir().unwrap();
    let address = format!("127.0.0.1:{}", free_port());
    let config = dir.path().join("config.yml");
    let root = dir.path().join("data");
    let text = format!(
        "version: 0.1\nlog:\n  level: warn\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n",
        root.display()
    );
    std::fs::write(&config, text).unwrap();
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(&config);
    start(command, address, dir)
}

/// An nginx with TLS and Basic auth (`user`, `secret`) before `backend`. `ca.pem` in its directory signs it. Blobs of the repository
/// `redirected` are redirected to `backend`, in plain http.
pub(crate) fn nginx(backend: &str) -> Service {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let address = format!("127.0.0.1:{}", free_port());
    certificate(dir.path());
    let users = run(Command::new("htpasswd").args(["-nbm", "user", "secret"]));
    std::fs::write(path("users"), users).unwrap();
    let config = format!(
        "daemon off; master_process off; user root; pid {pid}; error_log stderr;
events {{}}
http {{
  access_log {access};
  client_body_temp_path {tmp}; proxy_temp_path {tmp}; fastcgi_temp_path {tmp}; uwsgi_temp_path {tmp}; scgi_temp_path {tmp};
  server {{
    listen {address} ssl;
    ssl_certificate {cert}; ssl_certificate_key {key};
    client_max_body_size 0;
    auth_basic registry; auth_basic_user_file {users};
    location ~ ^/v2/redirected/blobs/sha256 {{ return 307 http://{backend}$request_uri; }}
    location / {{ proxy_pass http://{backend}; proxy_set_header Host $http_host; proxy_request_buffering off; }}
  }}
}}
",
        pid = path("pid"),
        access = path("access"),
        tmp = path("tmp"),
        cert = path("cert.pem"),
        key = path("key.pem"),
        users = path("users"),
    );
    std::fs::write(path("nginx.conf"), config).unwrap();
    let mut command = Command::new("nginx");
    command
        .arg("-e")
        .arg("stderr")
        .arg("-p")
        .arg(dir.path())
        .arg("-c")
        .arg(path("nginx.conf"));
    start(command, address, dir)
}

/// Makes `ca.pem` and a certificate for 127.0.0.1 by it.
fn certificate(dir: &Path) {
    let openssl = |arguments: &[&str]| {
        run(Command::new("openssl")
            .current_dir(dir)
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
            ])
            .args(["-days", "2"])
            .args(arguments))
    };
    openssl(&[
        "-subj",
        "/CN=test authority",
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
    ]);
    openssl(&[
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-subj",
        "/CN=127.0.0.1",
        "-keyout",
        "key.pem",
        "-out",
        "cert.pem",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
        "-addext",
        "basicConstraints=critical,CA:FALSE",
    ]);
}

/// Runs a command that must succeed, and gives its output.
pub(crate) fn run(command: &mut Command) -> Vec<u8> {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| {
        panic!(
            "{:?} cannot be started: {error}; install its Debian package",
            command.get_program()
        )
    });
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{said}", output.status);
    output.stdout
}
