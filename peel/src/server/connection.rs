//! One client of the server: its requests, one after the other, and the mounts that it leases.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, TrySendError};
use std::time::{Duration, Instant};

use anyhow::Context;
use peel_fs::{Image, Progress};
use peel_registry::ImageName;

use super::Server;
use crate::describe::describe;
use crate::protocol::{
    HEARTBEAT, MountRequest, Mounted, PROGRAM_VERSION, Request, Response, SILENCE, VERSION,
};
use crate::wire::{Connection, Error};

/// Progress messages that may wait for a slow client before the less important ones are left out.
const PROGRESS_QUEUE: usize = 64;

/// Serves a client until it closes the connection or breaks the protocol.
pub(super) fn serve(server: &Arc<Server>, stream: UnixStream) {
    let client = Connection::new(stream, Some(SILENCE)).map_err(Error::Io);
    let result = client.and_then(|client| {
        Client {
            server,
            client,
            leases: Vec::new(),
        }
        .serve()
    });
    match result {
        Ok(()) => {}
        Err(error) if error.is_disconnect() => {}
        Err(error) => tracing::warn!("client: {error}"),
    }
}

struct Client<'a> {
    server: &'a Arc<Server>,
    client: Connection,
    /// Mounts that end with this connection.
    leases: Vec<String>,
}

impl Drop for Client<'_> {
    fn drop(&mut self) {
        for id in &self.leases {
            if !self.server.mounts.is_kept(id) {
                self.server.mounts.release(id);
            }
        }
    }
}

impl Client<'_> {
    fn serve(mut self) -> Result<(), Error> {
        let (hello, _) = self.client.receive()?;
        self.client.send(
            &Response::Hello {
                protocol: VERSION,
                program: PROGRAM_VERSION.to_owned(),
                pid: std::process::id(),
            },
            None,
        )?;
        match hello {
            Request::Hello { protocol, program } if protocol == VERSION && program == PROGRAM_VERSION => {}
            // The client sees from the answer what is wrong, and says so.
            _ => return Ok(()),
        }
        // A client may hold its lease for days without asking anything.
        self.client.set_receive_deadline(None)?;
        loop {
            let (request, _) = self.client.receive()?;
            let (response, fd) = match request {
                Request::Mount(request) => match self.mount(&request) {
                    Ok((mounted, fd)) => (Response::Mounted(Box::new(mounted)), Some(fd)),
                    Err(error) => (failure(&request.image, &error), None),
                },
                Request::Keep { id, dir } => (done(self.server.mounts.keep(&id, dir)), None),
                Request::Release { id } => {
                    self.server.mounts.release(&id);
                    self.leases.retain(|lease| *lease != id);
                    (Response::Done, None)
                }
                Request::Status => (Response::Status(self.server.status()), None),
                Request::Stats => (Response::Stats(self.server.service.stats()), None),
                Request::Hello { .. } => {
                    let message = "hello came twice".to_owned();
                    (Response::Error { message }, None)
                }
            };
            self.client.send(&response, fd.as_ref().map(AsFd::as_fd))?;
        }
    }

    fn mount(&mut self, request: &MountRequest) -> anyhow::Result<(Mounted, OwnedFd)> {
        let begin = Instant::now();
        let stats_before = self.server.service.stats();
        let name: ImageName = request.image.parse()?;
        let (image, resolve) = self.load(request, name, begin)?;
        let config = String::from_utf8(image.config().to_vec()).context("configuration of the image")?;
        let layers = image.layers().to_vec();
        let manifest_digest = image.manifest_digest();
        let (id, fd) = self.server.mounts.add(&request.image, image, request.layer)?;
        self.leases.push(id.clone());
        let mounted = Mounted {
            id,
            manifest_digest,
            config,
            layers,
            resolve,
            mount: begin.elapsed(),
            stats_before,
        };
        tracing::info!(image = request.image, id = mounted.id, manifest = %manifest_digest, "mounted");
        Ok((mounted, fd))
    }

    /// Loads the image in a thread of its own, while this one tells the client how it goes.
    fn load(
        &mut self,
        request: &MountRequest,
        name: ImageName,
        begin: Instant,
    ) -> anyhow::Result<(Arc<Image>, Duration)> {
        let load = request.load_request(name);
        let service = &self.server.service;
        let (sender, progress) = mpsc::sync_channel(PROGRESS_QUEUE);
        let mut resolve = None;
        let mut gone = None;
        let image = std::thread::scope(|scope| {
            let worker = std::thread::Builder::new()
                .name("load".to_owned())
                .spawn_scoped(scope, move || {
                    let report = |step| {
                        // How far a pull is will be said again; that it began and the other steps come once.
                        let repeated = matches!(step, Progress::Pulling { done: 1.., .. });
                        match sender.try_send(step) {
                            Err(TrySendError::Full(step)) if !repeated => {
                                let _ = sender.send(step);
                            }
                            _ => {}
                        }
                    };
                    service.load(&load, &report).map_err(anyhow::Error::from)
                })
                .context("thread")?;
            loop {
                let message = match progress.recv_timeout(HEARTBEAT) {
                    Ok(step) => {
                        if matches!(step, Progress::Resolved { .. }) {
                            resolve.get_or_insert_with(|| begin.elapsed());
                        }
                        Response::Progress(step)
                    }
                    Err(RecvTimeoutError::Timeout) => Response::Working,
                    Err(RecvTimeoutError::Disconnected) => break,
                };
                if gone.is_none() {
                    // A load cannot be broken off; what it brings is in the store for the next time.
                    gone = self.client.send(&message, None).err();
                }
            }
            worker
                .join()
                .map_err(|_| anyhow::anyhow!("loading stopped unexpectedly; the server's log has more"))?
        })?;
        if let Some(error) = gone {
            return Err(anyhow::Error::from(error).context("client"));
        }
        Ok((image, resolve.unwrap_or_else(|| begin.elapsed())))
    }
}

fn done(result: anyhow::Result<()>) -> Response {
    match result {
        Ok(()) => Response::Done,
        Err(error) => Response::Error {
            message: describe(&error),
        },
    }
}

fn failure(image: &str, error: &anyhow::Error) -> Response {
    let message = describe(error);
    tracing::warn!(image, "not mounted: {message}");
    Response::Error { message }
}
