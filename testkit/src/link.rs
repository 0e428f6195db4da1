//! A shaped link: a TCP relay on one thread that makes a loopback server look as far away as a real one.
//!
//! Called by `peel demo`, by the end-to-end tests and by the benchmarks. It needs no privilege and no kernel module.
//!
//! What it models, in each direction on its own:
//!
//! * **delay**: every byte arrives half a round trip after its last neighbour in the same piece was sent;
//! * **handshake**: nothing of a new connection is carried before one round trip has passed since it was accepted, so
//!   the first answer on a fresh connection takes two round trips, later ones take one;
//! * **bandwidth**: one rate shared by all connections. Connections that have something to send take turns with pieces
//!   of at most [`PIECE`] bytes, as a fair queue would let them; a piece is on the wire for its length divided by
//!   the rate, and the next one follows it without a gap.
//!
//! What it does not model: TCP's slow start and loss (a fresh connection has the whole rate at once, which favours
//! whoever opens many of them), packet headers (the rate is that of the bytes inside TCP), name lookup, TLS, and the
//! acknowledgement path (a receiver that stops reading is noticed when its socket buffer and about one round trip of
//! bytes are full).
//!
//! Invariants: bytes of one direction of one connection keep their order; the schedule is kept in absolute times, so a
//! late wake-up delays single pieces but never lowers the rate; memory is bounded by connections times the queue limit.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Largest piece that one connection sends before the next one gets its turn, in bytes. Half a millisecond at the
/// default rate: small enough for fair turns, large enough to cost little.
pub const PIECE: usize = 32 * 1024;

/// How far ahead of the clock the wire may be filled. Bounds the number of wake-ups per second.
const HORIZON: Duration = Duration::from_millis(1);

/// Longest sleep, so that a request to stop is seen.
const IDLE: Duration = Duration::from_millis(100);

/// How long the server behind the link may take to accept; it is on this machine.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Connections at once; more than that wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1024;

/// How the link behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Round trip time; half of it is spent each way.
    pub rtt: Duration,
    /// Bits per second in each direction, shared by all connections. At least 1.
    pub bits_per_second: u64,
}

impl Default for Shape {
    /// 20 ms and 500 Mbit/s: a registry in the same region over an ordinary cloud uplink.
    fn default() -> Self {
        Self {
            rtt: Duration::from_millis(20),
            bits_per_second: 500_000_000,
        }
    }
}

impl Shape {
    /// How long `bytes` occupy the wire.
    pub fn wire_time(&self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 8 * 1_000_000_000 / u128::from(self.bits_per_second.max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Bytes one direction of one connection may hold: what is in flight for one round trip, and some pieces more so
    /// that a short link still streams.
    fn queue_limit(&self) -> usize {
        let bytes = u128::from(self.bits_per_second) * self.rtt.as_nanos() / 8 / 1_000_000_000;
        usize::try_from(bytes)
            .unwrap_or(usize::MAX / 2)
            .saturating_add(16 * PIECE)
            .min(256 << 20)
    }
}

/// What went over the link.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// Connections that were accepted.
    pub connections: u64,
    /// Bytes from the clients to the server, HTTP headers included.
    pub up_bytes: u64,
    /// Bytes from the server to the clients, HTTP headers included. Bytes count once they are on the wire, also when
    /// the client goes away before they arrive.
    pub down_bytes: u64,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    connections: AtomicU64,
    up_bytes: AtomicU64,
    down_bytes: AtomicU64,
}

/// A running link. Dropping it closes every connection.
#[derive(Debug)]
pub struct Link {
    addr: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Link {
    /// Listens on a free loopback port and relays to `server`.
    pub fn start(server: SocketAddr, shape: Shape) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        let relay = Relay {
            listener,
            server,
            shape,
            shared: Arc::clone(&shared),
            connections: Vec::new(),
            wires: [Wire::new(), Wire::new()],
            buffer: vec![0; PIECE],
        };
        let thread = std::thread::Builder::new()
            .name("testkit-link".into())
            .spawn(move || relay.run())?;
        Ok(Self {
            addr,
            shared,
            thread: Some(thread),
        })
    }

    /// Where clients connect.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What went over the link since it was started or last reset.
    pub fn counters(&self) -> LinkCounters {
        LinkCounters {
            connections: self.shared.connections.load(Ordering::Relaxed),
            up_bytes: self.shared.up_bytes.load(Ordering::Relaxed),
            down_bytes: self.shared.down_bytes.load(Ordering::Relaxed),
        }
    }

    /// Sets all counters to zero.
    pub fn reset_counters(&self) {
        for counter in [
            &self.shared.connections,
            &self.shared.up_bytes,
            &self.shared.down_bytes,
        ] {
            counter.store(0, Ordering::Relaxed);
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // A connection attempt wakes the thread; that it may fail does not matter, it wakes by itself soon.
        drop(TcpStream::connect_timeout(&self.addr, IDLE));
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the link's thread panicked");
        }
    }
}

/// Direction from the client to the server; index into the arrays below.
const UP: usize = 0;
/// Direction from the server to the client.
const DOWN: usize = 1;

/// One direction of the link as a whole.
#[derive(Debug)]
struct Wire {
    /// When the last piece has left the sender.
    free_at: Instant,
    /// Connection that is asked first for the next piece.
    turn: usize,
}

impl Wire {
    fn new() -> Self {
        Self {
            free_at: Instant::now(),
            turn: 0,
        }
    }
}

/// Bytes, or the end of the stream, on their way.
#[derive(Debug)]
struct Piece {
    arrives: Instant,
    bytes: Vec<u8>,
    sent: usize,
    end: bool,
}

/// One direction of one connection.
#[derive(Debug, Default)]
struct Flow {
    queue: VecDeque<Piece>,
    queued: usize,
    /// The source may have bytes.
    readable: bool,
    /// The source has ended.
    ended: bool,
    /// The end was passed on.
    closed: bool,
    /// The destination does not take bytes now.
    blocked: bool,
}

#[derive(Debug)]
struct Connection {
    /// Client and server socket: the sources of UP and DOWN.
    sockets: [TcpStream; 2],
    flows: [Flow; 2],
    open_at: Instant,
    dead: bool,
}

#[derive(Debug)]
struct Relay {
    listener: TcpListener,
    server: SocketAddr,
    shape: Shape,
    shared: Arc<Shared>,
    connections: Vec<Connection>,
    wires: [Wire; 2],
    buffer: Vec<u8>,
}

impl Relay {
    fn run(mut self) {
        while !self.shared.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            for direction in [UP, DOWN] {
                self.fill(direction, now);
            }
            self.deliver(Instant::now());
            self.connections.retain(|connection| !connection.is_over());
            self.sleep();
        }
    }

    /// Puts pieces on the wire until it is busy up to the horizon or nobody has anything.
    fn fill(&mut self, direction: usize, now: Instant) {
        let limit = self.shape.queue_limit();
        let Some(wire) = self.wires.get_mut(direction) else {
            return;
        };
        let count = self.connections.len();
        let mut idle = 0;
        while idle < count && wire.free_at <= now + HORIZON {
            wire.turn = (wire.turn + 1) % count;
            let Some(connection) = self.connections.get_mut(wire.turn) else {
                return;
            };
            let read = connection.take(direction, now, limit, &mut self.buffer);
            let Some(length) = read else {
                idle += 1;
                continue;
            };
            idle = 0;
            let bytes = self.buffer.get(..length).unwrap_or_default();
            let starts = wire.free_at.max(now);
            if !bytes.is_empty() {
                wire.free_at = starts + self.shape.wire_time(bytes.len() as u64);
                let counter = if direction == UP {
                    &self.shared.up_bytes
                } else {
                    &self.shared.down_bytes
                };
                counter.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            }
            let arrives = wire.free_at.max(starts) + self.shape.rtt / 2;
            connection.push(direction, bytes, arrives);
        }
    }

    fn deliver(&mut self, now: Instant) {
        for connection in &mut self.connections {
            for direction in [UP, DOWN] {
                connection.deliver(direction, now);
            }
        }
    }

    /// Waits for the next event or the next piece that is due, and notes which sockets may be used.
    fn sleep(&mut self) {
        let now = Instant::now();
        let mut until = now + IDLE;
        // What each poll entry stands for: connection, direction, reading or writing. The listener is entry 0.
        let mut meaning = Vec::with_capacity(self.connections.len() * 2);
        let mut fds = vec![PollFd::new(&self.listener, PollFlags::IN)];
        if self.connections.len() >= MAX_CONNECTIONS {
            fds.clear();
        }
        let listening = !fds.is_empty();
        let limit = self.shape.queue_limit();
        for (index, connection) in self.connections.iter().enumerate() {
            for direction in [UP, DOWN] {
                let (Some(flow), Some(source), Some(target)) = (
                    connection.flows.get(direction),
                    connection.sockets.get(direction),
                    connection.sockets.get(1 - direction),
                ) else {
                    continue;
                };
                if flow.blocked {
                    fds.push(PollFd::new(target, PollFlags::OUT));
                    meaning.push((index, direction, false));
                } else if let Some(piece) = flow.queue.front() {
                    until = until.min(piece.arrives);
                }
                if flow.ended || flow.queued >= limit {
                    continue;
                }
                if flow.readable {
                    let free = self.wires.get(direction).map_or(now, |wire| wire.free_at);
                    until = until.min(connection.open_at.max(free));
                } else {
                    fds.push(PollFd::new(source, PollFlags::IN));
                    meaning.push((index, direction, true));
                }
            }
        }
        let wait = until.saturating_duration_since(now);
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(wait.min(IDLE).subsec_nanos()),
        };
        if poll(&mut fds, Some(&timeout)).is_err() {
            return;
        }
        let accept = listening && fds.first().is_some_and(|fd| !fd.revents().is_empty());
        let ready: Vec<bool> = fds
            .iter()
            .skip(usize::from(listening))
            .map(|fd| !fd.revents().is_empty())
            .collect();
        for ((index, direction, reading), ready) in meaning.into_iter().zip(ready) {
            let Some(flow) = self
                .connections
                .get_mut(index)
                .and_then(|c| c.flows.get_mut(direction))
            else {
                continue;
            };
            match (ready, reading) {
                (true, true) => flow.readable = true,
                (true, false) => flow.blocked = false,
                (false, _) => {}
            }
        }
        if accept {
            self.accept();
        }
    }

    fn accept(&mut self) {
        let Ok((client, _)) = self.listener.accept() else {
            return;
        };
        if self.shared.stop.load(Ordering::Relaxed) {
            return;
        }
        let open_at = Instant::now() + self.shape.rtt;
        self.shared.connections.fetch_add(1, Ordering::Relaxed);
        // When the server does not accept, the client's connection is dropped: it sees a reset.
        let connected = TcpStream::connect_timeout(&self.server, CONNECT_TIMEOUT).and_then(|server| {
            for socket in [&client, &server] {
                socket.set_nonblocking(true)?;
                socket.set_nodelay(true)?;
            }
            Ok(server)
        });
        match connected {
            Ok(server) => self.connections.push(Connection {
                sockets: [client, server],
                flows: [Flow::default(), Flow::default()],
                open_at,
                dead: false,
            }),
            Err(error) => tracing::debug!(%error, "the server behind the link does not accept"),
        }
    }
}

impl Connection {
    /// Reads the next piece of one direction. `None` when there is nothing to carry now, 0 at the end.
    fn take(&mut self, direction: usize, now: Instant, limit: usize, buffer: &mut [u8]) -> Option<usize> {
        let flow = self.flows.get_mut(direction)?;
        if self.dead || !flow.readable || flow.ended || flow.queued >= limit || now < self.open_at {
            return None;
        }
        match self.sockets.get_mut(direction)?.read(buffer) {
            Ok(length) => {
                flow.ended = length == 0;
                // A short read has emptied the socket; asking again would only cost a call.
                flow.readable = length == buffer.len();
                Some(length)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                flow.readable = false;
                None
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => None,
            Err(_) => {
                self.dead = true;
                None
            }
        }
    }

    fn push(&mut self, direction: usize, bytes: &[u8], arrives: Instant) {
        if let Some(flow) = self.flows.get_mut(direction) {
            flow.queued += bytes.len();
            flow.queue.push_back(Piece {
                arrives,
                bytes: bytes.to_vec(),
                sent: 0,
                end: bytes.is_empty(),
            });
        }
    }

    /// Hands over what has arrived.
    fn deliver(&mut self, direction: usize, now: Instant) {
        let (Some(flow), Some(target)) = (self.flows.get_mut(direction), self.sockets.get_mut(1 - direction))
        else {
            return;
        };
        while !self.dead && !flow.blocked {
            let Some(piece) = flow.queue.front_mut() else {
                return;
            };
            if piece.arrives > now {
                return;
            }
            if piece.end {
                flow.closed = true;
                // The other side may be gone already, which is what this is to tell it.
                let _ = target.shutdown(Shutdown::Write);
                flow.queue.pop_front();
                continue;
            }
            match target.write(piece.bytes.get(piece.sent..).unwrap_or_default()) {
                Ok(written) => {
                    piece.sent += written;
                    flow.queued = flow.queued.saturating_sub(written);
                    if piece.sent >= piece.bytes.len() {
                        flow.queue.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => flow.blocked = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.dead = true,
            }
        }
    }

    fn is_over(&self) -> bool {
        self.dead || self.flows.iter().all(|flow| flow.closed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that answers every byte it gets with the same byte.
    fn echo() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let addr = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                std::thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    let mut copy = stream.try_clone().unwrap();
                    let _ = io::copy(&mut stream, &mut copy);
                    let _ = copy.shutdown(Shutdown::Write);
                });
            }
        });
        addr
    }

    #[test]
    fn wire_time_and_queue_limit_follow_the_shape() {
        let cases = [(500_000_000, 62_500_000, 1_000), (8_000, 1, 1), (8, 10, 10_000)];
        for (bits_per_second, bytes, millis) in cases {
            let shape = Shape {
                rtt: Duration::ZERO,
                bits_per_second,
            };
            assert_eq!(shape.wire_time(bytes), Duration::from_millis(millis));
        }
        assert_eq!(Shape::default().queue_limit(), 1_250_000 + 16 * PIECE);
        let absurd = Shape {
            rtt: Duration::from_secs(3600),
            bits_per_second: u64::MAX,
        };
        assert_eq!(absurd.queue_limit(), 256 << 20);
    }

    #[test]
    fn bytes_keep_their_order_and_are_counted_while_several_connections_share_the_wire() {
        let shape = Shape {
            rtt: Duration::from_millis(2),
            bits_per_second: 8_000_000_000,
        };
        let link = Link::start(echo(), shape).unwrap();
        let size = 1_000_000_usize;
        let clients: Vec<_> = (0..3_u8)
            .map(|seed| {
                let addr = link.addr();
                std::thread::spawn(move || {
                    let sent: Vec<u8> = (0..size)
                        .map(|i| u8::try_from((i * 7 + i / 251 + usize::from(seed)) % 256).unwrap())
                        .collect();
                    let stream = TcpStream::connect(addr).unwrap();
                    let mut writer = stream.try_clone().unwrap();
                    let copy = sent.clone();
                    let thread = std::thread::spawn(move || {
                        writer.write_all(&copy).unwrap();
                        writer.shutdown(Shutdown::Write).unwrap();
                    });
                    let mut got = Vec::new();
                    let mut reader = stream;
                    reader.read_to_end(&mut got).unwrap();
                    thread.join().unwrap();
                    assert!(got == sent, "the echo of connection {seed} differs");
                })
            })
            .collect();
        for client in clients {
            client.join().unwrap();
        }
        let expected = LinkCounters {
            connections: 3,
            up_bytes: 3_000_000,
            down_bytes: 3_000_000,
        };
        assert_eq!(link.counters(), expected);
        link.reset_counters();
        assert_eq!(link.counters(), LinkCounters::default());
    }

    #[test]
    fn nothing_is_carried_sooner_than_light_allows() {
        // Lower bounds only: a busy machine may be slower, never faster.
        let rtt = Duration::from_millis(20);
        let link = Link::start(
            echo(),
            Shape {
                rtt,
                bits_per_second: 80_000_000,
            },
        )
        .unwrap();
        let begin = Instant::now();
        let mut stream = TcpStream::connect(link.addr()).unwrap();
        let mut byte = [7];
        stream.write_all(&byte).unwrap();
        stream.read_exact(&mut byte).unwrap();
        assert!(
            begin.elapsed() >= rtt * 2,
            "a fresh connection answered after {:?}",
            begin.elapsed()
        );
        let begin = Instant::now();
        stream.write_all(&byte).unwrap();
        stream.read_exact(&mut byte).unwrap();
        assert!(
            begin.elapsed() >= rtt,
            "a kept connection answered after {:?}",
            begin.elapsed()
        );
        let begin = Instant::now();
        let mut large = vec![1; 1_000_000];
        let mut writer = stream.try_clone().unwrap();
        let copy = large.clone();
        let thread = std::thread::spawn(move || writer.write_all(&copy).unwrap());
        stream.read_exact(&mut large).unwrap();
        thread.join().unwrap();
        assert!(
            begin.elapsed() >= Duration::from_millis(100),
            "1 MB took {:?}",
            begin.elapsed()
        );
    }

    #[test]
    fn a_server_that_is_not_there_ends_the_connection() {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .unwrap()
            .local_addr()
            .unwrap();
        let link = Link::start(free, Shape::default()).unwrap();
        let mut stream = TcpStream::connect(link.addr()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let ended = match stream.read(&mut [0]) {
            Ok(length) => length == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        };
        assert!(ended);
    }
}
