//! What snapctl remembers: the catalogue of snapshots and the journal of operations.
//!
//! One SQLite file in WAL mode, synced at every commit, so that cron jobs and people can use it at the
//! same time and a power cut loses no record. The catalogue is a memory of names and times; which layer is
//! active, and what is frozen, is asked of QEMU and of the files.

use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use model::{Name, OperationId, SnapshotRecord};
use rusqlite::{Connection, OpenFlags, OptionalExtension, TransactionBehavior, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, Paths};

/// The format of the database that this program writes, in `PRAGMA user_version`.
const FORMAT: u32 = 1;
/// How long to wait while another snapctl writes.
const BUSY: Duration = Duration::from_secs(10);

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
        let failed = |source| Error::State { file: file.clone(), source };
        let mut connection = Connection::open(&file).map_err(failed)?;
        connection.busy_timeout(BUSY).map_err(failed)?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(failed)?;
        connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
        migrate(&mut connection, &file)?;
        Ok(Self { file, connection: Some(connection) })
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

    /// The snapshots of `vm`, in the order in which they were entered: clocks are set back.
    ///
    /// # Errors
    /// [`Error::State`]; [`Error::BadRecord`].
    pub fn snapshots(&self, vm: &Name) -> Result<Vec<SnapshotRecord>, Error> {
        self.select_snapshots("WHERE vm = ?1 ORDER BY rowid", params![vm.as_str()])
    }

    /// The snapshots of every VM, by VM, in the order in which they were entered.
    ///
    /// # Errors
    /// As [`State::snapshots`].
    pub fn all_snapshots(&self) -> Result<Vec<SnapshotRecord>, Error> {
        self.select_snapshots("ORDER BY vm, rowid", params![])
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

    fn select_snapshots(&self, rest: &str, by: impl rusqlite::Params) -> Result<Vec<SnapshotRecord>, Error> {
        let Some(connection) = &self.connection else { return Ok(Vec::new()) };
        let sql = format!("SELECT id, record FROM snapshots {rest}");
        let mut statement = connection.prepare(&sql).map_err(|source| self.failed(source))?;
        let rows = statement.query_map(by, |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)));
        let rows = rows.map_err(|source| self.failed(source))?;
        rows.map(|row| {
            let (id, record) = row.map_err(|source| self.failed(source))?;
            serde_json::from_str(&record).map_err(|fault| self.bad(&format!("snapshot {id}"), &fault))
        })
        .collect()
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
        let failed = |source| state.failed(source);
        let record = serde_json::to_string(snapshot).map_err(|fault| state.bad("a snapshot", &fault))?;
        let transaction =
            rusqlite::Transaction::new_unchecked(state.connection()?, TransactionBehavior::Immediate)
                .map_err(failed)?;
        let id = snapshot.id.to_string();
        let insert = "INSERT INTO snapshots (id, vm, name, created, record) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (id) DO NOTHING";
        let row =
            params![id, snapshot.vm.as_str(), snapshot.name.as_str(), snapshot.created.to_string(), record];
        transaction.execute(insert, row).map_err(|source| match source.sqlite_error_code() {
            Some(rusqlite::ErrorCode::ConstraintViolation) => {
                Error::SnapshotNameTaken { vm: snapshot.vm.clone(), name: snapshot.name.clone() }
            }
            _ => failed(source),
        })?;
        let delete = "DELETE FROM operations WHERE id = ?1";
        transaction.execute(delete, params![self.id.to_string()]).map_err(failed)?;
        transaction.commit().map_err(failed)
    }
}

fn migrate(connection: &mut Connection, file: &Path) -> Result<(), Error> {
    if known_format(connection, file)? == FORMAT {
        return Ok(());
    }
    let failed = |source| Error::State { file: file.to_owned(), source };
    // Two first commands at once: the second one waits here, and then finds the tables made.
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
    if known_format(&transaction, file)? == 0 {
        transaction.execute_batch(SCHEMA).map_err(failed)?;
        transaction.pragma_update(None, "user_version", FORMAT).map_err(failed)?;
    }
    transaction.commit().map_err(failed)
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
    use std::collections::BTreeMap;

    use model::{Consistency, SnapshotId};

    use super::*;

    fn record(bits: u64, name: &str) -> SnapshotRecord {
        SnapshotRecord {
            id: SnapshotId::from_bits(bits),
            vm: "vm1".parse().unwrap(),
            name: name.parse().unwrap(),
            created: Timestamp::from_second(1_700_000_000 + i64::try_from(bits).unwrap()).unwrap(),
            description: None,
            labels: BTreeMap::new(),
            consistency: Consistency::Crash,
            freeze: None,
            disks: Vec::new(),
            parent: None,
        }
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
        assert!(state.snapshots(&vm).unwrap().is_empty());

        state.resume(pending[0].id).unwrap().done(&record(1, "a")).unwrap();
        assert!(state.pending(None).unwrap().is_empty());
        assert_eq!(state.snapshots(&vm).unwrap(), [record(1, "a")]);
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
        assert_eq!(state.all_snapshots().unwrap().len(), 2);
    }

    #[test]
    fn a_reader_makes_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::under(dir.path());
        let state = State::open_existing(&paths).unwrap();
        assert!(state.all_snapshots().unwrap().is_empty() && state.pending(None).unwrap().is_empty());
        assert!(!paths.database().exists());
    }

    #[test]
    fn p6_a_newer_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::under(dir.path());
        let state = State::open(&paths).unwrap();
        state.connection().unwrap().pragma_update(None, "user_version", FORMAT + 1).unwrap();
        drop(state);
        assert!(matches!(State::open(&paths), Err(Error::NewerState { found: 2, known: 1, .. })));
        assert!(matches!(State::open_existing(&paths), Err(Error::NewerState { .. })));
    }
}
