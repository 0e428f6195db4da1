//! Other people's programs as peel's counterparts: Debian's docker-registry, nginx with TLS and Basic authentication in
//! front of it, containerd. Each runs on directories and ports of its own and ends with the value.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::namespace::Namespace;
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
    service: Service,
}

/// A request that a registry has answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `GET` and the like.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Status of the answer.
    pub status: u16,
    /// Bytes of its body.
    pub bytes: u64,
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
        Self { addr, service }
    }

    /// Copies an image into it as it is and returns its name here.
    pub fn take(&self, source: &str, repository: &str) -> String {
        let target = format!("{}/{repository}:latest", self.addr);
        let output = Command::new("skopeo")
            .args([
                "copy",
                "--quiet",
                "--all",
                "--preserve-digests",
                "--dest-tls-verify=false",
            ])
            .args([source, &format!("docker://{target}")])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "skopeo copy {source}: {}",
            errors(&output)
        );
        target
    }

    /// What it has answered so far, by its access log, oldest first.
    pub fn requests(&self) -> Vec<Request> {
        let log = fs::read_to_string(&self.service.log).unwrap();
        log.lines().filter_map(Request::parse).collect()
    }
}

impl Request {
    /// Reads a line of the common log format, whose request, status and size follow the first quote.
    fn parse(line: &str) -> Option<Self> {
        let (request, rest) = line.split_once("] \"")?.1.split_once("\" ")?;
        let (mut request, mut rest) = (request.split(' '), rest.split(' '));
        Some(Self {
            method: request.next()?.into(),
            path: request.next()?.into(),
            status: rest.next()?.parse().ok()?,
            bytes: rest.next()?.parse().ok()?,
        })
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
pub struct Containerd<'a> {
    namespace: Option<&'a Namespace>,
    socket: PathBuf,
    _service: Service,
}

impl Containerd<'static> {
    /// Starts the host's.
    pub fn start(dir: &Path) -> Self {
        Self::start_with(None, dir)
    }
}

impl<'a> Containerd<'a> {
    /// Starts one in a namespace, where its mounts stay.
    pub fn start_in(namespace: &'a Namespace, dir: &Path) -> Self {
        Self::start_with(Some(namespace), dir)
    }

    fn start_with(namespace: Option<&'a Namespace>, dir: &Path) -> Self {
        let socket = dir.join("c.sock");
        let config = dir.join("config.toml");
        fs::create_dir_all(dir).unwrap();
        let toml = format!(
            "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{1}\"\n[ttrpc]\naddress = \"{0}/t.sock\"\n",
            dir.display(),
            socket.display()
        );
        fs::write(&config, toml).unwrap();
        let program =
            |name: &str| namespace.map_or_else(|| Command::new(name), |namespace| namespace.command(name));
        let mut service = Service::start(dir, program("containerd").arg("--config").arg(&config));
        eventually("containerd to listen", || {
            service.assert_running();
            program("ctr")
                .arg("--address")
                .arg(&socket)
                .arg("version")
                .output()
                .is_ok_and(|o| o.status.success())
        });
        Self {
            namespace,
            socket,
            _service: service,
        }
    }

    /// Runs `ctr` and expects success.
    pub fn ctr(&self, arguments: &[&str]) -> String {
        self.client("ctr", arguments)
    }

    /// Runs a client, `ctr` or `ctr-remote`, and expects success.
    pub fn client(&self, name: &str, arguments: &[&str]) -> String {
        let mut command = self
            .namespace
            .map_or_else(|| Command::new(name), |namespace| namespace.command(name));
        let output = command
            .arg("--address")
            .arg(&self.socket)
            .args(arguments)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{name} {arguments:?}: {}",
            errors(&output)
        );
        text(&output)
    }

    /// Pulls an image from a registry without TLS into a namespace of containerd's, where it shares no layer with images in
    /// others, and mounts it on a new directory, whose path from outside is returned.
    pub fn pull_and_mount(&self, namespace: &str, image: &str, dir: &Path) -> PathBuf {
        let ctr = |arguments: &[&str]| self.ctr(&[&["--namespace", namespace, "image"], arguments].concat());
        ctr(&["pull", "--plain-http", image]);
        fs::create_dir_all(dir).unwrap();
        ctr(&["mount", image, &dir.display().to_string()]);
        self.namespace
            .map_or_else(|| dir.to_owned(), |namespace| namespace.path(dir))
    }
}
