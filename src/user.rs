//! Users of this machine: the user who runs a command, and the user whose process is at the other end of a connection.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rustix::process::{geteuid, getuid};

const ROOT: u32 = 0;

/// The kernel's id for every user without an id in this user namespace (`/proc/sys/kernel/overflowuid`).
const OVERFLOW: u32 = 65_534;

/// The connection is established (`TCP_ESTABLISHED`).
const ESTABLISHED: &str = "01";

/// The user who runs this process: `ann`, or `root (sudo by ann)`.
pub fn of_process() -> String {
    let user = name(getuid().as_raw());
    let by = [("sudo", "SUDO_USER"), ("doas", "DOAS_USER")]
        .into_iter()
        .find_map(|(tool, variable)| Some((tool, std::env::var(variable).ok()?)));
    match by {
        Some((tool, by)) if !by.is_empty() => format!("{user} ({tool} by {by})"),
        _ => user,
    }
}

/// The name of a user, or the id if there is no name.
pub fn name(uid: u32) -> String {
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    name_in(&users, uid).map_or_else(|| format!("user {uid}"), str::to_owned)
}

fn name_in(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let is_it = fields.nth(1)?.parse() == Ok(uid);
        is_it.then_some(name)
    })
}

/// Whether this user may do everything that the daemon may: it is the daemon's own user, or root.
pub fn is_trusted(uid: u32) -> bool {
    trusts(geteuid().as_raw(), uid)
}

fn trusts(own: u32, uid: u32) -> bool {
    uid == ROOT || uid == own && uid != OVERFLOW
}

/// The user whose process is at the other end of a connection within this machine, according to Linux; `None`: unknown.
pub fn of_peer(peer: SocketAddr, local: SocketAddr) -> Option<u32> {
    let read = || {
        // /proc/net is hidden by systemd's ProcSubset=pid.
        ["/proc/self/net/tcp", "/proc/self/net/tcp6"]
            .into_iter()
            .find_map(|table| owner_in(&fs::read_to_string(table).ok()?, peer, local))
    };
    let owner = read()?;
    // A socket that its process has closed shows root as its owner. Its state is no longer established by then, but the
    // kernel reads owner and state one after the other. A socket that is still established now was not closed before.
    read()?;
    Some(owner)
}

/// The owner of the established connection from `peer` to `local`, in one of Linux's tables of TCP connections.
fn owner_in(table: &str, peer: SocketAddr, local: SocketAddr) -> Option<u32> {
    let ends = [peer, local].map(canonical);
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let is_it = [address(fields.next()?)?, address(fields.next()?)?] == ends
            && fields.next()? == ESTABLISHED;
        // Queues, timer and retransmissions are in between.
        is_it.then(|| fields.nth(3)?.parse().ok()).flatten()
    })
}

/// An address in the format of those tables: hexadecimal, the IP address in words of this machine's byte order.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let word = |at: usize| {
        let word = ip.get(at * 8..at * 8 + 8)?;
        Some(u32::from_str_radix(word, 16).ok()?.to_ne_bytes())
    };
    let ip = match ip.len() {
        8 => IpAddr::from(Ipv4Addr::from(word(0)?)),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?];
            let bytes: [u8; 16] = words.concat().try_into().ok()?;
            IpAddr::from(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    let port = u16::from_str_radix(port, 16).ok()?;
    Some(canonical(SocketAddr::new(ip, port)))
}

/// An IPv4 address may be written as an IPv6 one.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home/ann:\n:x:7:7::/:\nbroken\n";

    #[cfg(target_endian = "little")]
    const TABLE: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:204C 00000000:0000 0A 00000000:00000000 00:00000000 00000000   990        0 1 1 0 100 0 0 10 0
   1: 0100007F:B564 0100007F:204C 01 00000000:00000000 00:00000000 00000000  4242        0 2 2 0 20 0 0 10 -1
   2: 0100007F:204C 0100007F:B564 01 00000000:00000000 00:00000000 00000000   990        0 3 1 0 20 0 0 10 -1
   3: 0100007F:B565 0100007F:204C 04 00000000:00000000 00:00000000 00000000     0        0 0 2 0 20 0 0 10 -1
   4: 0100007F:B564 0100007F:0050 01 00000000:00000000 00:00000000 00000000     0        0 4 2 0 20 0 0 10 -1
   5: 0000000000000000FFFF00000100007F:B566 0000000000000000FFFF00000100007F:204C 01 00000000:00000000 00:00000000 00000000  1000        0 5 2 0 20 0 0 10 -1
   6: 00000000000000000000000001000000:B567 00000000000000000000000001000000:204C 01 00000000:00000000 00:00000000 00000000  1001        0 6 2 0 20 0 0 10 -1
   7: nonsense
";

    /// The owner is that of the peer's established socket.
    #[test]
    #[cfg(target_endian = "little")]
    fn owner_of_the_peers_socket() {
        for (peer, local, owner) in [
            ("127.0.0.1:46436", "127.0.0.1:8268", Some(4242)),
            ("127.0.0.1:8268", "127.0.0.1:46436", Some(990)),
            ("127.0.0.1:46438", "127.0.0.1:8268", Some(1000)),
            ("[::ffff:127.0.0.1]:46438", "127.0.0.1:8268", Some(1000)),
            ("[::1]:46439", "[::1]:8268", Some(1001)),
            // Closed by its process: the kernel shows root.
            ("127.0.0.1:46437", "127.0.0.1:8268", None),
            ("127.0.0.1:46436", "127.0.0.1:8269", None),
            ("127.0.0.2:46436", "127.0.0.1:8268", None),
            ("127.0.0.1:1", "127.0.0.1:8268", None),
        ] {
            let [peer, local] = [peer, local].map(|end| end.parse().expect("an address"));
            assert_eq!(owner_in(TABLE, peer, local), owner, "{peer} {local}");
        }
        let any: SocketAddr = "127.0.0.1:1".parse().expect("an address");
        assert_eq!(owner_in("", any, any), None);
    }

    /// Only root and the daemon's own user are trusted.
    #[test]
    fn root_and_own_user_are_trusted() {
        for (own, uid, trusted) in [
            (990, 990, true),
            (990, ROOT, true),
            (990, 1000, false),
            (ROOT, 1000, false),
            (ROOT, ROOT, true),
            // Any user, in a user namespace.
            (OVERFLOW, OVERFLOW, false),
            (990, OVERFLOW, false),
        ] {
            assert_eq!(trusts(own, uid), trusted, "{own} {uid}");
        }
    }

    /// Names are read from the list of users.
    #[test]
    fn user_names_from_passwd() {
        assert_eq!(name_in(PASSWD, 0), Some("root"));
        assert_eq!(name_in(PASSWD, 1000), Some("ann"));
        assert_eq!(name_in(PASSWD, 7), None, "a name that is empty");
        assert_eq!(name_in(PASSWD, 4242), None);
    }
}
