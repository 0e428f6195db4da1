//! What a command and the server of a store say to each other over the socket, in frames of [`crate::wire`].
//!
//! A connection begins with [`Request::Hello`]; after it the client asks and the server answers, one request at a time.
//! A mount is leased to the connection that asked for it: when the connection closes, the server drops the mount's handle
//! and removes its writable layer. [`Request::Keep`] turns the lease into a mount that stays until
//! [`Request::Release`], or until no process has it in its mount namespace any more.

use std::path::PathBuf;
use std::time::Duration;

use peel_fs::{LayerReport, LoadRequest, Progress, PullPolicy, Stats};
use peel_image::Digest;
use peel_registry::{ClientOptions, ImageName};
use serde::{Deserialize, Serialize};

/// Version of these messages. The version of the program is compared too: both sides come from one binary.
pub const VERSION: u32 = 2;
/// Version of the program, as `peel --version` prints it.
pub const PROGRAM_VERSION: &str = env!("CARGO_PKG_VERSION");
/// How long either side may say nothing while the other waits. The server sends [`Response::Working`] far more often.
pub const SILENCE: Duration = Duration::from_secs(30);
/// How often the server shows that it still works.
pub const HEARTBEAT: Duration = Duration::from_secs(5);

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// The first message.
    Hello {
        /// [`VERSION`] of the client.
        protocol: u32,
        /// [`PROGRAM_VERSION`] of the client.
        program: String,
    },
    /// Load an image and mount it; [`Response::Progress`] follows, then [`Response::Mounted`] with a descriptor.
    Mount(MountRequest),
    /// The mount is about to be moved to a directory and outlives this connection.
    Keep {
        /// By which [`Response::Mounted`] named it.
        id: String,
        /// The directory, absolute.
        dir: PathBuf,
    },
    /// The mount is not used any more: drop its handle, remove its writable layer.
    Release {
        /// By which [`Response::Mounted`] named it.
        id: String,
    },
    /// Everything about the server.
    Status,
    /// Only the counters.
    Stats,
}

/// What to load and mount.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MountRequest {
    /// The image as the user writes it; paths in it are absolute.
    pub image: String,
    /// `os/architecture[/variant]`; `None` is this machine.
    pub platform: Option<String>,
    /// When to ask the registry.
    pub pull: PullPolicy,
    /// How to reach it.
    pub client: ClientOptions,
    /// Fetch the prioritized files in the background.
    pub prefetch: bool,
    /// Download and check every layer whole first.
    pub eager: bool,
    /// Whether a check in the background may download a layer a second time.
    pub check_by_download: bool,
    /// Whether the mount gets a writable layer.
    pub layer: WritableLayer,
}

/// Whether a mount gets a writable layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WritableLayer {
    /// It does.
    Required,
    /// It does where the store's file system can carry one: a read-only container needs it for places that the image lacks.
    Optional,
    /// It does not.
    None,
}

impl MountRequest {
    /// The request as the file system service takes it.
    pub fn load_request(&self, name: ImageName) -> LoadRequest {
        LoadRequest {
            name,
            platform: self.platform.clone(),
            pull: self.pull,
            client: self.client.clone(),
            prefetch: self.prefetch,
            eager: self.eager,
            check_by_download: self.check_by_download,
        }
    }
}

/// What the server answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Response {
    /// To [`Request::Hello`] of another version, too: the client decides.
    Hello {
        /// [`VERSION`] of the server.
        protocol: u32,
        /// [`PROGRAM_VERSION`] of the server.
        program: String,
        /// Process id of the server.
        pid: u32,
    },
    /// The image is being loaded.
    Progress(Progress),
    /// Nothing new, but the server is at it.
    Working,
    /// The image is mounted; its detached mount comes beside this message.
    Mounted(Box<Mounted>),
    /// To [`Request::Keep`] and [`Request::Release`].
    Done,
    /// To [`Request::Status`].
    Status(Status),
    /// To [`Request::Stats`].
    Stats(Stats),
    /// The request failed; the connection goes on.
    Error {
        /// What, where and what to do, for people.
        message: String,
    },
}

/// A mounted image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mounted {
    /// Name of the mount in the store.
    pub id: String,
    /// Digest of the platform's manifest.
    pub manifest_digest: Digest,
    /// The image's configuration, JSON.
    pub config: String,
    /// How each layer is served, lowest first.
    pub layers: Vec<LayerReport>,
    /// Time from the request until the manifest was known.
    pub resolve: Duration,
    /// Time from the request until the mount was ready.
    pub mount: Duration,
    /// Counters of the server at the time of the request.
    pub stats_before: Stats,
}

/// A server and what it has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Its process id.
    pub pid: u32,
    /// How long it has been running.
    pub uptime: Duration,
    /// Open connections, this one too.
    pub connections: usize,
    /// Its mounts.
    pub mounts: Vec<MountStatus>,
    /// What it has fetched.
    pub stats: Stats,
}

/// One mount of a server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MountStatus {
    /// Name of the mount in the store.
    pub id: String,
    /// The image as the user wrote it.
    pub image: String,
    /// Digest of the platform's manifest.
    pub manifest_digest: Digest,
    /// Where `peel mount` put it; `None` for one that is leased to a connection.
    pub dir: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pull() -> impl Strategy<Value = PullPolicy> {
        prop_oneof![
            Just(PullPolicy::Always),
            Just(PullPolicy::Missing),
            Just(PullPolicy::Never)
        ]
    }

    fn path() -> impl Strategy<Value = PathBuf> {
        "/[ -~]{0,60}".prop_map(PathBuf::from)
    }

    fn client() -> impl Strategy<Value = ClientOptions> {
        (
            any::<bool>(),
            proptest::option::of(path()),
            any::<u32>(),
            proptest::collection::vec(path(), 0..3),
        )
            .prop_map(|(plain_http, tls_ca, seconds, auth_files)| ClientOptions {
                plain_http,
                tls_ca,
                attempt_timeout: Duration::from_millis(seconds.into()),
                retry_for: Duration::from_secs(seconds.into()),
                auth_files,
            })
    }

    fn request() -> impl Strategy<Value = Request> {
        prop_oneof![
            (any::<u32>(), ".*").prop_map(|(protocol, program)| Request::Hello { protocol, program }),
            (
                ".*",
                proptest::option::of(".*"),
                pull(),
                client(),
                any::<[bool; 3]>(),
                prop_oneof![
                    Just(WritableLayer::Required),
                    Just(WritableLayer::Optional),
                    Just(WritableLayer::None)
                ]
            )
                .prop_map(
                    |(image, platform, pull, client, [prefetch, eager, check_by_download], layer)| {
                        Request::Mount(MountRequest {
                            image,
                            platform,
                            pull,
                            client,
                            prefetch,
                            eager,
                            check_by_download,
                            layer,
                        })
                    }
                ),
            (".*", path()).prop_map(|(id, dir)| Request::Keep { id, dir }),
            ".*".prop_map(|id| Request::Release { id }),
            Just(Request::Status),
            Just(Request::Stats),
        ]
    }

    fn response() -> impl Strategy<Value = Response> {
        prop_oneof![
            (any::<u32>(), ".*", any::<u32>()).prop_map(|(protocol, program, pid)| Response::Hello {
                protocol,
                program,
                pid
            }),
            (any::<[u8; 32]>(), any::<u64>(), ".*").prop_map(|(digest, number, text)| {
                Response::Mounted(Box::new(Mounted {
                    id: text.clone(),
                    manifest_digest: Digest::from_bytes(digest),
                    config: text.clone(),
                    layers: vec![LayerReport {
                        digest: Digest::from_bytes(digest),
                        size: number,
                        not_lazy: Some(text),
                    }],
                    resolve: Duration::from_nanos(number),
                    mount: Duration::from_nanos(number),
                    stats_before: Stats {
                        requests: number,
                        bytes: number,
                    },
                }))
            }),
            (".*", any::<u64>()).prop_map(|(reason, total)| Response::Progress(Progress::Pulling {
                layer: 3,
                reason,
                done: total / 2,
                total
            })),
            Just(Response::Working),
            Just(Response::Done),
            ".*".prop_map(|message| Response::Error { message }),
        ]
    }

    proptest! {
        #[test]
        fn requests_round_trip(request in request()) {
            let text = serde_json::to_vec(&request).unwrap();
            prop_assert_eq!(serde_json::from_slice::<Request>(&text).unwrap(), request);
        }

        #[test]
        fn responses_round_trip(response in response()) {
            let text = serde_json::to_vec(&response).unwrap();
            prop_assert_eq!(serde_json::from_slice::<Response>(&text).unwrap(), response);
        }
    }
}
