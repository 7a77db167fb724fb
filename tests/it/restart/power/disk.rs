//! A simulated disk. For each file it has the synced content, and the later changes that a power cut may lose.

use std::collections::BTreeMap;

use rand::RngExt;
use rand::rngs::StdRng;

/// The unit that a disk writes completely or not at all, in bytes.
const SECTOR: usize = 512;

/// What the daemon does to a file of its database, or to the directory that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Creates it if it does not exist.
    Create,
    Write {
        at: usize,
        bytes: Vec<u8>,
    },
    Resize(usize),
    Remove,
    /// Everything done to its content so far is safe from here on.
    Sync,
    /// The same for all names in the directory.
    SyncNames,
}

/// The unsynced changes that have reached the disk when the power fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Survival {
    Nothing,
    /// Names and sizes, and no content: zeros where a file has grown.
    Sizes,
    /// The first changes to each file, in order.
    Prefix,
    /// Any changes, each completely or not at all.
    Subset,
    /// Any sectors of any changes.
    Torn,
}

impl Survival {
    /// A random case in which some of the content survives.
    pub(super) fn by_chance(random: &mut StdRng) -> Self {
        [Self::Prefix, Self::Subset, Self::Torn][random.random_range(0..3)]
    }
}

/// The database's files by their names.
pub(super) type Files = BTreeMap<String, Vec<u8>>;

#[derive(Clone, Debug, Default)]
struct Content {
    safe: Vec<u8>,
    unsynced: Vec<Change>,
}

/// One directory on a disk. A file that is removed and created again is another file under the same name, and the old
/// one may be back after a power cut.
#[derive(Clone, Debug, Default)]
pub(super) struct Disk {
    files: Vec<Content>,
    names: BTreeMap<String, usize>,
    safe_names: BTreeMap<String, usize>,
    unsynced_names: Vec<(String, Option<usize>)>,
}

impl Disk {
    pub(super) fn change(&mut self, name: &str, change: &Change) {
        match (change, self.names.get(name)) {
            (Change::SyncNames, _) => {
                self.safe_names.clone_from(&self.names);
                self.unsynced_names.clear();
            }
            (Change::Create, None) => {
                self.files.push(Content::default());
                self.set_name(name, Some(self.files.len() - 1));
            }
            (Change::Create, Some(_)) => {}
            (Change::Remove, _) => self.set_name(name, None),
            (Change::Sync, Some(file)) => self.files[*file].sync(),
            (change, Some(file)) => self.files[*file].unsynced.push(change.clone()),
            (change, None) => panic!("{change:?} of {name}, which does not exist"),
        }
    }

    fn set_name(&mut self, name: &str, file: Option<usize>) {
        put(&mut self.names, name, file);
        self.unsynced_names.push((name.to_owned(), file));
    }

    /// The files after a power cut.
    pub(super) fn after_a_power_cut(&self, survival: Survival, random: &mut StdRng) -> Files {
        let mut names = self.safe_names.clone();
        let prefix = random.random_range(0..=self.unsynced_names.len());
        for (number, (name, file)) in self.unsynced_names.iter().enumerate() {
            let survives = match survival {
                Survival::Nothing => false,
                Survival::Sizes => true,
                Survival::Prefix => number < prefix,
                Survival::Subset | Survival::Torn => random.random(),
            };
            if survives {
                put(&mut names, name, *file);
            }
        }
        let mut content = |file: usize| self.files[file].after_a_power_cut(survival, random);
        let files = names.into_iter().map(|(name, file)| (name, content(file)));
        files.collect()
    }
}

fn put(names: &mut BTreeMap<String, usize>, name: &str, file: Option<usize>) {
    match file {
        Some(file) => names.insert(name.to_owned(), file),
        None => names.remove(name),
    };
}

impl Content {
    fn sync(&mut self) {
        for change in std::mem::take(&mut self.unsynced) {
            change.apply(&mut self.safe);
        }
    }

    /// A sector that survives contains everything written to it so far, because it is written from memory as a whole.
    /// The other sectors are unchanged, or zeros where the file was shorter. The size is stored separately, so it
    /// survives independently of the content.
    fn after_a_power_cut(&self, survival: Survival, random: &mut StdRng) -> Vec<u8> {
        let (mut memory, mut disk) = (self.safe.clone(), self.safe.clone());
        // The sizes before the first change and after each.
        let mut sizes = vec![memory.len()];
        let prefix = random.random_range(0..=self.unsynced.len());
        // Rarely, often or nearly always. If it were always one half, hardly any log would survive beyond its first
        // frames.
        let chance = [0.1, 0.5, 0.9, 0.99][random.random_range(0..4)];
        for (number, change) in self.unsynced.iter().enumerate() {
            change.apply(&mut memory);
            sizes.push(memory.len());
            let is_lost = match survival {
                Survival::Nothing | Survival::Sizes => true,
                Survival::Prefix => number >= prefix,
                Survival::Subset => !random.random_bool(chance),
                Survival::Torn => false,
            };
            if is_lost {
                continue;
            }
            for start in change.sectors() {
                if survival == Survival::Torn && !random.random_bool(chance) {
                    continue;
                }
                let end = memory.len().min(start + SECTOR);
                if disk.len() < end {
                    disk.resize(end, 0);
                }
                disk[start..end].copy_from_slice(&memory[start..end]);
            }
        }
        let size = match survival {
            Survival::Nothing => 0,
            Survival::Sizes => sizes.len() - 1,
            Survival::Prefix => prefix,
            Survival::Subset | Survival::Torn => random.random_range(0..sizes.len()),
        };
        disk.resize(sizes[size], 0);
        disk
    }
}

impl Change {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::Write { at, bytes } => {
                let end = at + bytes.len();
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[*at..end].copy_from_slice(bytes);
            }
            Self::Resize(size) => content.resize(*size, 0),
            Self::Create | Self::Remove | Self::Sync | Self::SyncNames => {}
        }
    }

    /// The start of each sector that a write touches.
    fn sectors(&self) -> impl Iterator<Item = usize> {
        let range = match self {
            Self::Write { at, bytes } => at / SECTOR * SECTOR..at + bytes.len(),
            _ => 0..0,
        };
        range.step_by(SECTOR)
    }
}
