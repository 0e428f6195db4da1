//! Other people's programs as peel's counterparts: Debian's docker-registry, nginx with TLS and Basic authentication in
//! front of it, containerd. Each runs on directories and ports of its own and ends with the value.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::world::{errors, eventually, text};

/// A loopback port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0))
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// A program that ends with this value.
#[derive(Debug)]
pub struct Service {
    child: Child,
    /// What it is called in messages.
    name: String,
    log: PathBuf,
}

impl Service {
    /// Starts it with its output in `dir`.
    fn start(dir: &Path, command: &mut Command) -> Self {
        let name = command.get_program().to_string_lossy().into_owned();
        let log = dir.join("output.log");
        let file = fs::File::create(&log).unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {name}: {error}; test.sh installs it"));
        Self { child, name, log }
    }

    /// Waits until it accepts connections.
    fn wait_for_port(&mut self, addr: SocketAddr) {
        eventually(&format!("{} to listen", self.name), || {
            self.assert_running();
            TcpStream::connect_timeout(&addr, Duration::from_secs(1)).is_ok()
        });
    }

    fn assert_running(&mut self) {
        let status = self.child.try_wait().unwrap();
        let output = fs::read_to_string(&self.log).unwrap_or_default();
        assert!(status.is_none(), "{} ended: {status:?}\n{output}", self.name);
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        // SIGTERM first: nginx and containerd have children to end.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        for _ in 0..100 {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Debian's docker-registry on plain HTTP.
#[derive(Debug)]
pub struct DockerRegistry {
    /// Where it listens.
    pub addr: SocketAddr,
    _service: Service,
}

impl DockerRegistry {
    /// Starts one with its content in `dir`.
    pub fn start(dir: &Path) -> Self {
        let addr = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let config = dir.join("config.yml");
        let content = dir.join("content");
        let yaml = format!(
            "version: 0.1\nlog:\n  level: warn\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {addr}\n",
            content.display()
        );
        fs::write(&config, yaml).unwrap();
        let mut service = Service::start(dir, Command::new("docker-registry").arg("serve").arg(&config));
        service.wait_for_port(addr);
        Self {
            addr,
            _service: service,
        }
    }
}

/// nginx that speaks TLS and wants a password, in front of a registry.
#[derive(Debug)]
pub struct TlsFront {
    /// Host name and port that its certificate is for.
    pub host: String,
    /// The certificate of its authority.
    pub ca: PathBuf,
    _service: Service,
}

/// Who may enter.
pub const USER: &str = "reader";
/// With this.
pub const PASSWORD: &str = "open sesame";

impl TlsFront {
    /// Starts one with its files in `dir`.
    pub fn start(dir: &Path, registry: SocketAddr) -> Self {
        let addr = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let (ca, passwords) = (certificate(dir), dir.join("passwords"));
        let hash = Command::new("openssl")
            .args(["passwd", "-apr1", PASSWORD])
            .output()
            .unwrap();
        fs::write(&passwords, format!("{USER}:{}", text(&hash))).unwrap();
        let root = dir.display();
        let config = format!(
            "daemon off; master_process off; pid {root}/pid; error_log stderr warn;\n\
             events {{ worker_connections 256; }}\n\
             http {{ access_log off; client_max_body_size 0; proxy_request_buffering off;\n\
             client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3;\n\
             uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;\n\
             server {{ listen {addr} ssl; ssl_certificate {root}/server.pem; ssl_certificate_key {root}/server.key;\n\
             auth_basic \"private\"; auth_basic_user_file {root}/passwords;\n\
             location /v2/ {{ proxy_pass http://{registry}; proxy_set_header Host $http_host;\n\
             proxy_set_header X-Forwarded-Proto https; proxy_set_header Authorization \"\"; }} }} }}\n"
        );
        let file = dir.join("nginx.conf");
        fs::write(&file, config).unwrap();
        // Workers are not root; the directory of a test is root's alone, so everything stays in one process.
        let mut service = Service::start(
            dir,
            Command::new("/usr/sbin/nginx")
                .arg("-e")
                .arg("stderr")
                .arg("-c")
                .arg(&file),
        );
        service.wait_for_port(addr);
        Self {
            host: format!("localhost:{}", addr.port()),
            ca,
            _service: service,
        }
    }
}

/// Makes an authority and a certificate for localhost by it; returns the authority's certificate.
fn certificate(dir: &Path) -> PathBuf {
    let openssl = |arguments: &[&str]| {
        let output = Command::new("openssl")
            .current_dir(dir)
            .args(arguments)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "openssl {arguments:?}: {}",
            errors(&output)
        );
    };
    openssl(&[
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=test authority",
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
    ]);
    openssl(&[
        "req",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=localhost",
        "-keyout",
        "server.key",
        "-out",
        "server.csr",
    ]);
    fs::write(dir.join("names"), "subjectAltName=DNS:localhost,IP:127.0.0.1\n").unwrap();
    openssl(&[
        "x509",
        "-req",
        "-in",
        "server.csr",
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-days",
        "2",
        "-extfile",
        "names",
        "-out",
        "server.pem",
    ]);
    dir.join("ca.pem")
}

/// A containerd of its own: configuration, state, socket and content in one directory.
#[derive(Debug)]
pub struct Containerd {
    socket: PathBuf,
    _service: Service,
}

impl Containerd {
    /// Starts one.
    pub fn start(dir: &Path) -> Self {
        let socket = dir.join("c.sock");
        let config = dir.join("config.toml");
        let toml = format!(
            "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{1}\"\n[ttrpc]\naddress = \"{0}/t.sock\"\n",
            dir.display(),
            socket.display()
        );
        fs::write(&config, toml).unwrap();
        let mut service = Service::start(dir, Command::new("containerd").arg("--config").arg(&config));
        eventually("containerd to listen", || {
            service.assert_running();
            Command::new("ctr")
                .arg("--address")
                .arg(&socket)
                .arg("version")
                .output()
                .is_ok_and(|o| o.status.success())
        });
        Self {
            socket,
            _service: service,
        }
    }

    /// Runs `ctr` and expects success.
    pub fn ctr(&self, arguments: &[&str]) -> String {
        let output = Command::new("ctr")
            .arg("--address")
            .arg(&self.socket)
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "ctr {arguments:?}: {}", errors(&output));
        text(&output)
    }
}
