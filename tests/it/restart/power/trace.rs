//! The daemon's system calls, as recorded by strace: its changes to the database files, its requests and the responses,
//! in one order.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use super::disk::Change;
use crate::harness::process::through;

/// Every call by which a file can be changed, renamed or mapped, and those that send and receive. Calls with a question
/// mark do not exist on every architecture.
const CALLS: &str = "trace=?open,openat,openat2,?creat,write,pwrite64,writev,pwritev,pwritev2,truncate,ftruncate,\
    fallocate,copy_file_range,sendfile,splice,fsync,fdatasync,sync_file_range,?unlink,unlinkat,?rename,?renameat,renameat2,\
    ?link,linkat,?symlink,symlinkat,mmap,sendto,sendmsg,recvfrom,io_uring_setup";

/// One recorded step of the daemon.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// It changed a file of its database.
    Disk(String, Change),
    /// A request with this line was sent to the service at this port. It may have been carried out from here on.
    Asked(u16, String),
    /// An answer arrived from the service at this port. The request has been carried out.
    Answered(u16),
}

/// The command under strace. The started process is the command itself; strace runs in the background.
pub(super) fn traced(command: &Command, trace: &Path) -> Command {
    let trace = trace.to_str().expect("a path in UTF-8");
    // Text is in hex and complete. File descriptors have their paths or addresses.
    let options = "strace -D -f -yy -xx --seccomp-bpf -s 10000000 -e";
    let mut strace: Vec<&str> = options.split(' ').collect();
    strace.extend([CALLS, "-o", trace]);
    through(&strace, command)
}

/// Whether the trace of a process has come to its end.
pub(super) fn is_complete(trace: &Path, process: &str) -> bool {
    let Ok(trace) = File::open(trace) else {
        return false;
    };
    let size = trace.metadata().expect("a file").len();
    let mut end = [0; 100];
    let read = trace
        .read_at(&mut end, size.saturating_sub(100))
        .expect("a file");
    let end = String::from_utf8_lossy(&end[..read]).into_owned();
    let last = end
        .strip_suffix('\n')
        .and_then(|end| end.lines().next_back());
    last.is_some_and(|last| last.starts_with(&format!("{process} ")) && last.contains(" +++ "))
}

/// The steps of a trace. Files other than those of this database are ignored.
pub(super) fn steps(trace: &str, db: &Path) -> Vec<Step> {
    let mut steps = Vec::new();
    // The call of each thread that has begun and not ended yet.
    let mut begun = HashMap::<&str, &str>::new();
    for line in trace.lines() {
        let (thread, event) = line.split_once(' ').expect("a thread");
        let event = event.trim_start();
        if let Some(call) = event.strip_suffix(" <unfinished ...>") {
            if !call.starts_with("<...") {
                // The service may read a request before the call that sent it ends.
                steps.extend(asked(call));
                begun.insert(thread, call);
            }
        } else if let Some((_, end)) = event
            .split_once(" resumed>")
            .filter(|_| event.starts_with("<..."))
        {
            let begin = begun.remove(thread).expect("a call that began");
            steps.extend(done(&format!("{begin}{end}"), db));
        } else if event.starts_with(|c: char| c.is_ascii_lowercase()) {
            steps.extend(asked(event));
            steps.extend(done(event, db));
        }
    }
    steps
}

/// The request that a call sends, if it sends one.
fn asked(call: &str) -> Option<Step> {
    let (name, rest) = call.split_once('(')?;
    if !matches!(name, "write" | "writev" | "sendto" | "sendmsg") {
        return None;
    }
    let port = port(rest)?;
    let sent = text(rest)?;
    let head = String::from_utf8_lossy(&sent);
    let line = head.lines().next()?.strip_suffix(" HTTP/1.1")?;
    Some(Step::Asked(port, line.to_owned()))
}

/// What a completed call did to the database files or received.
fn done(call: &str, db: &Path) -> Option<Step> {
    let (name, rest) = call.split_once('(').expect("a call");
    let (arguments, result) = rest.rsplit_once(" = ").expect("a result");
    if result.starts_with(['-', '?']) {
        return None;
    }
    if name == "recvfrom" {
        let received = port(arguments).zip(text(arguments));
        return received
            .filter(|(_, bytes)| bytes.starts_with(b"HTTP/1.1 "))
            .map(|(port, _)| Step::Answered(port));
    }
    assert_ne!(name, "io_uring_setup", "writes that strace does not see");
    let arguments = arguments.trim_end().trim_end_matches(')');
    let parts: Vec<&str> = arguments.split(", ").collect();
    let number = |at: usize| -> usize { parts[at].parse().expect("a number") };
    let is_open = matches!(name, "open" | "openat" | "openat2" | "creat");
    let is_about_names = ["link", "rename", "truncate"]
        .iter()
        .any(|part| name.contains(part) && name != "ftruncate");
    let db_name = db.as_os_str().as_bytes();
    let path = match is_open || is_about_names {
        true => quoted(arguments).find(|path| path.starts_with(db_name)),
        false => described(arguments),
    }?;
    if path == db.parent()?.as_os_str().as_bytes() {
        let syncs = matches!(name, "fsync" | "fdatasync");
        return syncs.then(|| Step::Disk(String::new(), Change::SyncNames));
    }
    let file = path.strip_prefix(db_name)?;
    let file = String::from_utf8(file.to_vec()).expect("the end of a name");
    if file == "-shm" {
        // An index of the log in shared memory; SQLite rebuilds it after a power cut.
        return None;
    }
    let change = match name {
        _ if is_open => {
            assert!(!arguments.contains("O_TRUNC"), "not modelled: {call}");
            arguments.contains("O_CREAT").then_some(Change::Create)?
        }
        "pwrite64" => {
            let bytes = text(parts[1]).expect("what is written");
            let all = bytes.len() == number(2) && result == parts[2];
            assert!(all, "a write of {} bytes out of {}", result, number(2));
            Change::Write {
                at: number(3),
                bytes,
            }
        }
        "ftruncate" => Change::Resize(number(1)),
        "fsync" | "fdatasync" => Change::Sync,
        "unlink" => Change::Remove,
        "mmap" if !arguments.contains("PROT_WRITE") => return None,
        _ => panic!("not modelled: {}", &call[..call.len().min(200)]),
    };
    Some(Step::Disk(file, change))
}

/// The port at the other end of a call's socket: `16<TCP:[127.0.0.1:51556->127.0.0.1:8267]>`.
fn port(arguments: &str) -> Option<u16> {
    let (_, rest) = arguments.split_once("<TCP:[")?;
    let (ends, _) = rest.split_once("]>")?;
    ends.rsplit_once(':')?.1.parse().ok()
}

/// The path of a call's first file descriptor: `14<\x2f\x74>`.
fn described(arguments: &str) -> Option<Vec<u8>> {
    let (_, rest) = arguments.split_once("<\\x")?;
    let (path, _) = rest.split_once('>')?;
    Some(bytes(path))
}

/// The first text among a call's arguments: `"\x2f\x74"`.
fn text(arguments: &str) -> Option<Vec<u8>> {
    assert!(!arguments.contains("\"..."), "strace has shortened a text");
    quoted(arguments).next()
}

/// All texts among a call's arguments.
fn quoted(arguments: &str) -> impl Iterator<Item = Vec<u8>> {
    let texts = arguments.split('"').skip(1).step_by(2);
    texts.map(|text| bytes(text.strip_prefix("\\x").unwrap_or_default()))
}

fn bytes(hex: &str) -> Vec<u8> {
    let digit = |digit: u8| char::from(digit).to_digit(16).expect("hex") as u8;
    let hex = hex.as_bytes();
    // Two digits, then the next byte's `\x`.
    let pairs = hex.chunks(4).filter(|chunk| chunk.len() >= 2);
    pairs
        .map(|pair| digit(pair[0]) << 4 | digit(pair[1]))
        .collect()
}
