//! What snapctl remembers: the catalogue of snapshots and the journal of operations.
//!
//! One SQLite file in WAL mode, synced at every commit, so that cron jobs and people can use it at the
//! same time and a power cut loses no record. The catalogue is a memory of names and times; which layer is
//! active, and what is frozen, is asked of QEMU and of the files.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use model::{Fingerprint, Head, History, Name, OperationId, SnapshotId, SnapshotRecord};
use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, Paths};

/// The format of the database that this program writes, in `PRAGMA user_version`.
const FORMAT: u32 = 2;
/// How long to wait while another snapctl writes.
const BUSY: Duration = Duration::from_secs(10);
/// Between two attempts to open it.
const BUSY_POLL: Duration = Duration::from_millis(10);

const SCHEMA: &str = "
    CREATE TABLE snapshots (
        id TEXT PRIMARY KEY,
        vm TEXT NOT NULL,
        name TEXT NOT NULL,
        created TEXT NOT NULL,
        record TEXT NOT NULL,
        UNIQUE (vm, name)
    ) STRICT;
    CREATE TABLE operations (
        id TEXT PRIMARY KEY,
        vm TEXT NOT NULL,
        kind TEXT NOT NULL,
        started TEXT NOT NULL,
        pid INTEGER NOT NULL,
        step TEXT NOT NULL,
        plan TEXT NOT NULL,
        notes TEXT NOT NULL DEFAULT 'null'
    ) STRICT;
";

/// What format 2 adds: where each disk went on.
const SCHEMA_HEADS: &str = "
    CREATE TABLE heads (
        vm TEXT NOT NULL,
        path TEXT NOT NULL,
        head TEXT NOT NULL,
        PRIMARY KEY (vm, path)
    ) STRICT;
";

/// The catalogue and the journal.
#[derive(Debug)]
pub struct State {
    file: PathBuf,
    /// None while there is no file: a reader must not make one.
    connection: Option<Connection>,
}

/// An operation in the journal that is being carried out.
#[derive(Debug)]
pub struct Operation<'a> {
    state: &'a State,
    id: OperationId,
}

/// An operation that did not end.
#[derive(Clone, Debug)]
pub struct PendingOperation {
    /// Its id.
    pub id: OperationId,
    /// The VM.
    pub vm: Name,
    /// What kind of operation, for example `create`.
    pub kind: String,
    /// When it began.
    pub started: Timestamp,
    /// The last step that was ticked off. A hint: what is, is observed.
    pub step: String,
    plan: String,
    notes: String,
    file: PathBuf,
}

impl PendingOperation {
    /// The plan that was written before the first step.
    ///
    /// # Errors
    /// [`Error::BadRecord`] if it is no plan of this kind.
    pub fn plan<P: DeserializeOwned>(&self) -> Result<P, Error> {
        self.read(&self.plan)
    }

    /// What was noted with [`Operation::note`] last; none if nothing was.
    ///
    /// # Errors
    /// [`Error::BadRecord`] if it is of another kind.
    pub fn notes<N: DeserializeOwned>(&self) -> Result<Option<N>, Error> {
        self.read(&self.notes)
    }

    fn read<T: DeserializeOwned>(&self, text: &str) -> Result<T, Error> {
        serde_json::from_str(text).map_err(|fault| Error::BadRecord {
            file: self.file.clone(),
            what: format!("operation {}", self.id),
            fault: fault.to_string(),
        })
    }
}

impl State {
    /// Opens the state for reading and writing; makes it if it is not there.
    ///
    /// # Errors
    /// [`Error::NewerState`]; [`Error::State`]; [`Error::Host`].
    pub fn open(paths: &Paths) -> Result<Self, Error> {
        host::files::make_private_dir(&paths.state)?;
        let file = paths.database();
        let deadline = Instant::now() + BUSY;
        loop {
            match Self::try_open(&file) {
                // Two first uses at once: SQLite's own patience does not cover the change to WAL.
                Err(Error::State { source, .. }) if is_busy(&source) && Instant::now() < deadline => {
                    std::thread::sleep(BUSY_POLL);
                }
                opened => return opened,
            }
        }
    }

    fn try_open(file: &Path) -> Result<Self, Error> {
        let failed = |source| Error::State { file: file.to_owned(), source };
        let mut connection = Connection::open(file).map_err(failed)?;
        connection.busy_timeout(BUSY).map_err(failed)?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
        connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
        migrate(&mut connection, file)?;
        Ok(Self { file: file.to_owned(), connection: Some(connection) })
    }

    /// Opens the state for reading. A state that is not there is an empty one.
    ///
    /// # Errors
    /// As [`State::open`].
    pub fn open_existing(paths: &Paths) -> Result<Self, Error> {
        let file = paths.database();
        match file.try_exists() {
            Ok(false) => return Ok(Self { file, connection: None }),
            Ok(true) => {}
            Err(source) => return Err(host::Error::io("look for", &file)(source).into()),
        }
        let failed = |source| Error::State { file: file.clone(), source };
        // A reader of a WAL database writes to its -shm file; without permission SQLite reads it as it is.
        let connection = Connection::open_with_flags(&file, OpenFlags::SQLITE_OPEN_READ_WRITE)
            .or_else(|_| Connection::open_with_flags(&file, OpenFlags::SQLITE_OPEN_READ_ONLY))
            .map_err(failed)?;
        connection.busy_timeout(BUSY).map_err(failed)?;
        // Format 0: somebody died before the tables were made.
        let made = known_format(&connection, &file)? > 0;
        Ok(Self { file, connection: made.then_some(connection) })
    }

    /// What is remembered of `vm`, or of every VM.
    ///
    /// # Errors
    /// [`Error::State`]; [`Error::BadRecord`].
    pub fn history(&self, vm: Option<&Name>) -> Result<History, Error> {
        let Some(connection) = &self.connection else { return Ok(History::default()) };
        let mut history = History {
            snapshots: self.select(connection, "snapshot", SELECT_SNAPSHOTS, vm)?,
            heads: match known_format(connection, &self.file)? {
                1 => Vec::new(),
                _ => self.select(connection, "head", SELECT_HEADS, vm)?,
            },
        };
        derive_heads(&mut history);
        Ok(history)
    }

    /// Writes an operation's plan down, before its first step.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn begin<P: Serialize>(
        &self,
        id: OperationId,
        vm: &Name,
        kind: &str,
        plan: &P,
    ) -> Result<Operation<'_>, Error> {
        let plan =
            serde_json::to_string(plan).map_err(|fault| self.bad(&format!("operation {id}"), &fault))?;
        let started = Timestamp::now().to_string();
        let row = params![id.to_string(), vm.as_str(), kind, started, std::process::id(), "begun", plan];
        let sql = "INSERT INTO operations (id, vm, kind, started, pid, step, plan) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
        self.connection()?.execute(sql, row).map_err(|source| self.failed(source))?;
        Ok(Operation { state: self, id })
    }

    /// Lets a snapshot of `vm` be protected, or not. Returns whether that is new.
    ///
    /// # Errors
    /// [`Error::State`]; [`Error::BadRecord`].
    pub fn protect(&self, vm: &Name, id: SnapshotId, protected: bool) -> Result<bool, Error> {
        let mut is_new = false;
        self.commit(|transaction| {
            let mut history = self.history(Some(vm))?;
            for snapshot in history.snapshots.iter_mut().filter(|snapshot| snapshot.id == id) {
                is_new |= snapshot.protected != protected;
                snapshot.protected = protected;
            }
            self.put(transaction, vm, &history)
        })?;
        Ok(is_new)
    }

    /// Keeps what the frozen layer at `path` of `vm` is.
    ///
    /// # Errors
    /// [`Error::State`]; [`Error::BadRecord`].
    pub fn note_fingerprint(&self, vm: &Name, path: &Path, fingerprint: &Fingerprint) -> Result<(), Error> {
        self.commit(|transaction| {
            let mut history = self.history(Some(vm))?;
            history.note_fingerprint(path, fingerprint);
            self.put(transaction, vm, &history)
        })
    }

    /// Operations that did not end, oldest first, of `vm` or of every VM.
    ///
    /// # Errors
    /// [`Error::State`]; [`Error::BadRecord`].
    pub fn pending(&self, vm: Option<&Name>) -> Result<Vec<PendingOperation>, Error> {
        let Some(connection) = &self.connection else { return Ok(Vec::new()) };
        let sql = "SELECT id, vm, kind, started, step, plan, notes FROM operations WHERE ?1 IS NULL OR vm = ?1 ORDER BY started";
        let mut statement = connection.prepare(sql).map_err(|source| self.failed(source))?;
        let rows = statement.query_map(params![vm.map(Name::as_str)], |row| {
            let text = |n| row.get::<_, String>(n);
            Ok([text(0)?, text(1)?, text(2)?, text(3)?, text(4)?, text(5)?, text(6)?])
        });
        let rows = rows.map_err(|source| self.failed(source))?;
        rows.map(|row| self.pending_operation(row.map_err(|source| self.failed(source))?)).collect()
    }

    /// Takes up an operation again.
    ///
    /// # Errors
    /// [`Error::NoSuchOperation`]; [`Error::State`].
    pub fn resume(&self, id: OperationId) -> Result<Operation<'_>, Error> {
        let found = self
            .connection()?
            .query_row("SELECT 1 FROM operations WHERE id = ?1", params![id.to_string()], |_| Ok(()))
            .optional()
            .map_err(|source| self.failed(source))?;
        found.map(|()| Operation { state: self, id }).ok_or(Error::NoSuchOperation(id))
    }

    fn pending_operation(&self, row: [String; 7]) -> Result<PendingOperation, Error> {
        let [id, vm, kind, started, step, plan, notes] = row;
        let what = format!("operation {id}");
        Ok(PendingOperation {
            id: id.parse().map_err(|fault| self.bad(&what, &fault))?,
            vm: vm.parse().map_err(|fault| self.bad(&what, &fault))?,
            started: started.parse().map_err(|fault| self.bad(&what, &fault))?,
            kind,
            step,
            plan,
            notes,
            file: self.file.clone(),
        })
    }

    /// Reads rows of (what it is called, its JSON).
    fn select<T: DeserializeOwned>(
        &self,
        connection: &Connection,
        what: &str,
        sql: &str,
        vm: Option<&Name>,
    ) -> Result<Vec<T>, Error> {
        let mut statement = connection.prepare(sql).map_err(|source| self.failed(source))?;
        let rows = statement.query_map(params![vm.map(Name::as_str)], |row| {
            Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
        });
        let rows = rows.map_err(|source| self.failed(source))?;
        rows.map(|row| {
            let (name, text) = row.map_err(|source| self.failed(source))?;
            serde_json::from_str(&text).map_err(|fault| self.bad(&format!("{what} {name}"), &fault))
        })
        .collect()
    }

    /// Writes to the state in one commit.
    fn commit(&self, write: impl FnOnce(&Transaction<'_>) -> Result<(), Error>) -> Result<(), Error> {
        let failed = |source| self.failed(source);
        let connection = self.connection()?;
        let transaction =
            Transaction::new_unchecked(connection, TransactionBehavior::Immediate).map_err(failed)?;
        write(&transaction)?;
        transaction.commit().map_err(failed)
    }

    /// Puts `history` in the place of what is remembered of `vm`.
    fn put(&self, transaction: &Transaction<'_>, vm: &Name, history: &History) -> Result<(), Error> {
        for table in ["snapshots", "heads"] {
            let delete = format!("DELETE FROM {table} WHERE vm = ?1");
            transaction.execute(&delete, params![vm.as_str()]).map_err(|source| self.failed(source))?;
        }
        history.snapshots.iter().try_for_each(|snapshot| self.insert(transaction, snapshot).map(drop))?;
        history.heads.iter().try_for_each(|head| self.insert_head(transaction, head))
    }

    /// Inserts a snapshot, unless it is there. Returns whether it was new.
    fn insert(&self, transaction: &Transaction<'_>, snapshot: &SnapshotRecord) -> Result<bool, Error> {
        let record = serde_json::to_string(snapshot).map_err(|fault| self.bad("a snapshot", &fault))?;
        let id = snapshot.id.to_string();
        // A deleted one lets go of its name.
        let name = if snapshot.deleted.is_some() { &id } else { snapshot.name.as_str() };
        let row = params![id, snapshot.vm.as_str(), name, snapshot.created.to_string(), record];
        let inserted = transaction.execute(INSERT_SNAPSHOT, row);
        inserted.map(|rows| rows > 0).map_err(|source| match source.sqlite_error_code() {
            Some(rusqlite::ErrorCode::ConstraintViolation) => {
                Error::SnapshotNameTaken { vm: snapshot.vm.clone(), name: snapshot.name.clone() }
            }
            _ => self.failed(source),
        })
    }

    fn insert_head(&self, transaction: &Transaction<'_>, head: &Head) -> Result<(), Error> {
        let text = serde_json::to_string(head).map_err(|fault| self.bad("a head", &fault))?;
        let row = params![head.vm.as_str(), head.path.to_string_lossy(), text];
        transaction.execute(INSERT_HEAD, row).map(drop).map_err(|source| self.failed(source))
    }

    fn end(&self, transaction: &Transaction<'_>, id: OperationId) -> Result<(), Error> {
        let delete = "DELETE FROM operations WHERE id = ?1";
        let ended = transaction.execute(delete, params![id.to_string()]);
        ended.map(drop).map_err(|source| self.failed(source))
    }

    fn connection(&self) -> Result<&Connection, Error> {
        // Only `open_existing` has none, and what it gives is only read.
        self.connection.as_ref().ok_or_else(|| self.failed(rusqlite::Error::InvalidQuery))
    }

    fn failed(&self, source: rusqlite::Error) -> Error {
        Error::State { file: self.file.clone(), source }
    }

    fn bad(&self, what: &str, fault: &dyn std::fmt::Display) -> Error {
        Error::BadRecord { file: self.file.clone(), what: what.to_owned(), fault: fault.to_string() }
    }
}

impl Operation<'_> {
    /// The operation's id.
    pub fn id(&self) -> OperationId {
        self.id
    }

    /// Ticks a step off, durably.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn tick(&self, step: &str) -> Result<(), Error> {
        let sql = "UPDATE operations SET step = ?2 WHERE id = ?1";
        let done = self.state.connection()?.execute(sql, params![self.id.to_string(), step]);
        done.map(drop).map_err(|source| self.state.failed(source))
    }

    /// Ticks a step off and keeps what only this step could tell, durably, in place of earlier notes.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn note<N: Serialize>(&self, step: &str, notes: &N) -> Result<(), Error> {
        let notes = serde_json::to_string(notes).map_err(|fault| self.state.bad("notes", &fault))?;
        let sql = "UPDATE operations SET step = ?2, notes = ?3 WHERE id = ?1";
        let done = self.state.connection()?.execute(sql, params![self.id.to_string(), step, notes]);
        done.map(drop).map_err(|source| self.state.failed(source))
    }

    /// Ends the operation without a record: all of it was undone.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn undone(self) -> Result<(), Error> {
        self.state
            .connection()?
            .execute("DELETE FROM operations WHERE id = ?1", params![self.id.to_string()])
            .map(drop)
            .map_err(|source| self.state.failed(source))
    }

    /// Ends the operation and enters the snapshot that it made, in one commit. A snapshot that is entered
    /// already stays as it is.
    ///
    /// # Errors
    /// [`Error::SnapshotNameTaken`]; [`Error::State`].
    pub fn done(self, snapshot: &SnapshotRecord) -> Result<(), Error> {
        let state = self.state;
        let mut history = state.history(Some(&snapshot.vm))?;
        state.commit(|transaction| {
            if state.insert(transaction, snapshot)? {
                history.enter(snapshot.clone());
                state.put(transaction, &snapshot.vm, &history)?;
            }
            state.end(transaction, self.id)
        })
    }

    /// Ticks a step off, keeps `notes` in place of earlier ones, and puts `history` in the place of what was
    /// remembered of `vm`, in one commit.
    ///
    /// # Errors
    /// [`Error::SnapshotNameTaken`]; [`Error::State`].
    pub fn rewrite<N: Serialize>(
        &self,
        step: &str,
        notes: &N,
        vm: &Name,
        history: &History,
    ) -> Result<(), Error> {
        let notes = serde_json::to_string(notes).map_err(|fault| self.state.bad("notes", &fault))?;
        self.state.commit(|transaction| {
            self.state.put(transaction, vm, history)?;
            let sql = "UPDATE operations SET step = ?2, notes = ?3 WHERE id = ?1";
            let done = transaction.execute(sql, params![self.id.to_string(), step, notes]);
            done.map(drop).map_err(|source| self.state.failed(source))
        })
    }

    /// Ends the operation and puts `history` in the place of what was remembered of `vm`, in one commit.
    ///
    /// # Errors
    /// [`Error::SnapshotNameTaken`]; [`Error::State`].
    pub fn finish(self, vm: &Name, history: &History) -> Result<(), Error> {
        self.state.commit(|transaction| {
            self.state.put(transaction, vm, history)?;
            self.state.end(transaction, self.id)
        })
    }
}

/// Their order is the one in which they were entered: clocks are set back.
const SELECT_SNAPSHOTS: &str =
    "SELECT id, record FROM snapshots WHERE ?1 IS NULL OR vm = ?1 ORDER BY vm, rowid";
const SELECT_HEADS: &str = "SELECT path, head FROM heads WHERE ?1 IS NULL OR vm = ?1 ORDER BY vm, rowid";
const INSERT_SNAPSHOT: &str = "INSERT INTO snapshots (id, vm, name, created, record)
    VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT (id) DO NOTHING";
const INSERT_HEAD: &str = "INSERT INTO heads (vm, path, head) VALUES (?1, ?2, ?3)";

fn is_busy(fault: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseBusy, DatabaseLocked};

    matches!(fault.sqlite_error_code(), Some(DatabaseBusy | DatabaseLocked))
}

fn migrate(connection: &mut Connection, file: &Path) -> Result<(), Error> {
    if known_format(connection, file)? == FORMAT {
        return Ok(());
    }
    let failed = |source| Error::State { file: file.to_owned(), source };
    // Two first commands at once: the second one waits here, and then finds the tables made.
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
    let found = known_format(&transaction, file)?;
    if found == 0 {
        transaction.execute_batch(SCHEMA).map_err(failed)?;
    }
    if found < FORMAT {
        transaction.execute_batch(SCHEMA_HEADS).map_err(failed)?;
        transaction.pragma_update(None, "user_version", FORMAT).map_err(failed)?;
    }
    transaction.commit().map_err(failed)
}

/// The heads of a history that was written before there were any.
fn derive_heads(history: &mut History) {
    if history.heads.is_empty() {
        let snapshots = std::mem::take(&mut history.snapshots);
        snapshots.into_iter().for_each(|snapshot| history.enter(snapshot));
    }
}

fn known_format(connection: &Connection, file: &Path) -> Result<u32, Error> {
    let found: u32 = connection
        .pragma_query_value(None, "user_version", |row| row.get(0))
        .map_err(|source| Error::State { file: file.to_owned(), source })?;
    if found > FORMAT {
        return Err(Error::NewerState { file: file.to_owned(), found, known: FORMAT });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {

    use model::{ByteSize, DiskName, ImageFormat, LayerRecord, SnapshotId};

    use super::*;

    fn record(bits: u64, name: &str) -> SnapshotRecord {
        SnapshotRecord::new(
            SnapshotId::from_bits(bits),
            "vm1".parse().unwrap(),
            name.parse().unwrap(),
            Timestamp::from_second(1_700_000_000 + i64::try_from(bits).unwrap()).unwrap(),
        )
    }

    fn on(mut snapshot: SnapshotRecord, path: &str, overlay: &str) -> SnapshotRecord {
        snapshot.disks = vec![LayerRecord::new(
            DiskName::new("va"),
            path.into(),
            ImageFormat::Raw,
            overlay.into(),
            ByteSize(1),
        )];
        snapshot
    }

    fn begin(state: &State, bits: u64) -> Operation<'_> {
        state.begin(OperationId::from_bits(bits), &"vm1".parse().unwrap(), "create", &["plan"]).unwrap()
    }

    #[test]
    fn an_operation_is_pending_until_it_is_done_or_undone() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::under(dir.path());
        let vm: Name = "vm1".parse().unwrap();
        let state = State::open(&paths).unwrap();
        begin(&state, 1).note("files", &[7]).unwrap();
        state.resume(OperationId::from_bits(1)).unwrap().tick("prepared").unwrap();
        drop(state);

        let state = State::open(&paths).unwrap();
        let pending = state.pending(Some(&vm)).unwrap();
        assert_eq!((pending.len(), pending[0].step.as_str()), (1, "prepared"));
        assert_eq!(pending[0].plan::<Vec<String>>().unwrap(), ["plan"]);
        assert!(pending[0].plan::<u64>().is_err());
        assert_eq!(pending[0].notes::<Vec<u64>>().unwrap(), Some(vec![7]));
        assert!(state.history(Some(&vm)).unwrap().snapshots.is_empty());

        state.resume(pending[0].id).unwrap().done(&record(1, "a")).unwrap();
        assert!(state.pending(None).unwrap().is_empty());
        assert_eq!(state.history(Some(&vm)).unwrap().snapshots, [record(1, "a")]);
        assert!(matches!(state.resume(pending[0].id), Err(Error::NoSuchOperation(_))));

        begin(&state, 2).undone().unwrap();
        assert!(state.pending(None).unwrap().is_empty());
    }

    #[test]
    fn a_name_is_taken_once_for_each_vm() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(&Paths::under(dir.path())).unwrap();
        begin(&state, 1).done(&record(1, "a")).unwrap();
        assert!(matches!(begin(&state, 2).done(&record(2, "a")), Err(Error::SnapshotNameTaken { .. })));
        // The refused operation is still there for recovery to look at.
        assert_eq!(state.pending(None).unwrap().len(), 1);
        let mut other = record(3, "a");
        other.vm = "vm2".parse().unwrap();
        begin(&state, 3).done(&other).unwrap();
        assert_eq!(state.history(None).unwrap().snapshots.len(), 2);
    }

    #[test]
    fn the_heads_follow_and_a_deleted_snapshot_lets_go_of_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(&Paths::under(dir.path())).unwrap();
        let vm: Name = "vm1".parse().unwrap();
        begin(&state, 1).done(&on(record(1, "a"), "/i/a", "/i/a.1")).unwrap();
        begin(&state, 2).done(&on(record(2, "b"), "/i/a.1", "/i/a.2")).unwrap();
        let mut history = state.history(Some(&vm)).unwrap();
        let head = |history: &History| (history.heads.len(), history.heads[0].path.clone());
        assert_eq!(head(&history), (1, "/i/a.2".into()));

        history.snapshots[0].deleted = Some(Timestamp::UNIX_EPOCH);
        let operation = begin(&state, 3);
        operation.rewrite("deleted", &["note"], &vm, &history).unwrap();
        assert_eq!(state.history(Some(&vm)).unwrap(), history);
        assert_eq!(state.pending(None).unwrap()[0].notes::<Vec<String>>().unwrap().unwrap(), ["note"]);
        operation.finish(&vm, &history).unwrap();
        assert!(state.pending(None).unwrap().is_empty());
        begin(&state, 4).done(&on(record(4, "a"), "/i/a.2", "/i/a.3")).unwrap();
        assert_eq!(head(&state.history(None).unwrap()), (1, "/i/a.3".into()));
    }

    #[test]
    fn a_state_of_the_first_format_gets_its_heads() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::under(dir.path());
        let state = State::open(&paths).unwrap();
        begin(&state, 1).done(&on(record(1, "a"), "/i/a", "/i/a.1")).unwrap();
        let expected = state.history(None).unwrap();
        let back = "DROP TABLE heads; PRAGMA user_version = 1;";
        state.connection().unwrap().execute_batch(back).unwrap();
        assert_eq!(State::open_existing(&paths).unwrap().history(None).unwrap(), expected);
        drop(state);
        assert_eq!(State::open(&paths).unwrap().history(None).unwrap(), expected);
    }

    #[test]
    fn many_first_uses_at_once_wait_for_each_other() {
        for round in 0..10 {
            let dir = tempfile::tempdir().unwrap();
            let paths = Paths::under(dir.path());
            std::thread::scope(|scope| {
                let first_use = |bits: u64| {
                    let state = State::open(&paths)?;
                    let vm = format!("vm{bits}").parse().unwrap();
                    state.begin(OperationId::from_bits(bits), &vm, "create", &["plan"]).map(drop)
                };
                let uses: Vec<_> = (0..24_u64).map(|bits| scope.spawn(move || first_use(bits))).collect();
                for used in uses {
                    used.join().unwrap().unwrap_or_else(|fault| panic!("round {round}: {fault}"));
                }
            });
            assert_eq!(State::open(&paths).unwrap().pending(None).unwrap().len(), 24);
        }
    }

    #[test]
    fn a_reader_makes_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::under(dir.path());
        let state = State::open_existing(&paths).unwrap();
        assert!(state.history(None).unwrap().snapshots.is_empty() && state.pending(None).unwrap().is_empty());
        assert!(!paths.database().exists());
    }

    #[test]
    fn p6_a_newer_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::under(dir.path());
        let state = State::open(&paths).unwrap();
        state.connection().unwrap().pragma_update(None, "user_version", FORMAT + 1).unwrap();
        drop(state);
        assert!(matches!(State::open(&paths), Err(Error::NewerState { found: 3, known: 2, .. })));
        assert!(matches!(State::open_existing(&paths), Err(Error::NewerState { .. })));
    }
}
