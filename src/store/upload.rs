//! Uploads: what clients are pushing, before it is a blob. The layout is distribution's,
//! `_uploads/<uuid>/data`, so that its own clean-up finds what is left of one.

use std::fmt;
use std::fs::{self, File, FileTimes, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use ring::rand::{SecureRandom, SystemRandom};

use super::catalog::Page;
use super::filesystem::{Filesystem, absent};
use super::layout::{self, Repository};
use super::own::make_folder_of;
use super::{Store, StoreError};
use crate::failpoint::failpoint;
use crate::oci::{Algorithm, Digest, Hasher};

/// Uploads that nothing was added to for so long are given up.
pub const UPLOAD_STALE: Duration = Duration::from_hours(24);
/// Bytes that are read at once, to hash them.
const READ: usize = 256 * 1024;

/// The name of an upload: a random UUID, so that nobody guesses another's. Source: RFC 9562, 5.4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct UploadId(u128);

impl UploadId {
    /// One that no other upload has.
    pub fn random() -> Result<Self, StoreError> {
        let mut bytes = [0; 16];
        let filled = SystemRandom::new().fill(&mut bytes);
        filled.map_err(|_| {
            let error = std::io::Error::other("the system has no random numbers");
            StoreError::new("name", Path::new("an upload"), error)
        })?;
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Ok(Self(u128::from_be_bytes(bytes)))
    }
}

impl fmt::Display for UploadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = format!("{:032x}", self.0);
        let parts = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| &hex[part]);
        f.write_str(&parts.join("-"))
    }
}

/// A text that is not the name of an upload.
#[derive(Debug, PartialEq, Eq)]
pub struct NoUpload;

impl FromStr for UploadId {
    type Err = NoUpload;

    fn from_str(text: &str) -> Result<Self, NoUpload> {
        let hex = text.replace('-', "");
        let digits = hex.len() == 32 && hex.bytes().all(|c| c.is_ascii_hexdigit());
        let id = u128::from_str_radix(&hex, 16).ok().filter(|_| digits);
        // As it is written here: it becomes a part of a path.
        id.map(Self)
            .filter(|id| id.to_string() == text)
            .ok_or(NoUpload)
    }
}

/// What is known of an upload between two requests: no file is open meanwhile.
#[derive(Clone)]
pub struct Session {
    /// Bytes that are there.
    pub length: u64,
    /// Has taken those bytes.
    pub hasher: Hasher,
}

impl Session {
    /// An upload of nothing yet.
    pub fn new(algorithm: Algorithm) -> Self {
        Self {
            length: 0,
            hasher: Hasher::new(algorithm),
        }
    }
}

/// An upload that is being written.
pub struct Upload {
    /// What is there.
    pub session: Session,
    file: File,
    path: PathBuf,
}

/// What became of an upload that was to be a blob.
pub enum Committed {
    /// It is one.
    Blob,
    /// Its bytes have another digest, this one; it is gone.
    Mismatch(Digest),
}

impl Filesystem {
    /// Makes room for what a client is going to send.
    pub fn begin_upload(&self, of: &Repository, id: &UploadId) -> Result<(), StoreError> {
        let folder = self.root.join(layout::upload(of, id));
        fs::create_dir_all(&folder).map_err(|e| StoreError::new("create", &folder, e))?;
        let data = self.root.join(layout::upload_data(of, id));
        let created = OpenOptions::new().create_new(true).write(true).open(&data);
        created.map_err(|e| StoreError::new("create", &data, e))?;
        let started = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        self.write(&layout::upload_started(of, id), started.as_bytes())
    }

    /// What is there of an upload that this process knows nothing of, hashed; `None` where there is
    /// no such upload.
    pub fn find_upload(
        &self,
        of: &Repository,
        id: &UploadId,
        algorithm: Algorithm,
    ) -> Result<Option<Session>, StoreError> {
        let path = self.root.join(layout::upload_data(of, id));
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if absent(&e) => return Ok(None),
            Err(e) => return Err(StoreError::new("open", &path, e)),
        };
        hash(file, &path, algorithm).map(Some)
    }

    /// Opens an upload to go on with it; `None` where it is gone.
    pub fn open_upload(
        &self,
        of: &Repository,
        id: &UploadId,
        session: Session,
    ) -> Result<Option<Upload>, StoreError> {
        let path = self.root.join(layout::upload_data(of, id));
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(e) if absent(&e) => return Ok(None),
            Err(e) => return Err(StoreError::new("open", &path, e)),
        };
        // What was half-written is not in the session.
        file.set_len(session.length)
            .map_err(|e| StoreError::new("cut", &path, e))?;
        Ok(Some(Upload {
            session,
            file,
            path,
        }))
    }

    /// Makes an upload a blob of a repository, if its bytes are those of `digest`: on the disk
    /// before it has its name, and linked before anybody is told.
    pub fn commit_upload(
        &self,
        of: &Repository,
        id: &UploadId,
        upload: Upload,
        digest: &Digest,
    ) -> Result<Committed, StoreError> {
        let found = upload.digest(digest.algorithm())?;
        let Upload {
            session,
            file,
            path,
        } = upload;
        if found != *digest {
            self.cancel_upload(of, id)?;
            return Ok(Committed::Mismatch(found));
        }
        let now = FileTimes::new().set_accessed(SystemTime::now());
        file.set_times(now)
            .and_then(|()| file.sync_all())
            .map_err(|e| StoreError::new("sync", &path, e))?;
        failpoint!(UploadSynced);
        // Not evicted between its name and its link.
        let _lease = self.leases.take(digest);
        let target = self.root.join(layout::blob(digest));
        make_folder_of(&target)?;
        // Where there is one already these bytes replace it, which are known to be right.
        let before = fs::metadata(&target).map_or(0, |metadata| metadata.len());
        let more = session.length.saturating_sub(before);
        self.usage.add(digest, more, || {
            fs::rename(&path, &target).map_err(|e| StoreError::new("write", &target, e))
        })?;
        super::filesystem::sync_parent(&target)?;
        failpoint!(UploadRenamed);
        self.link_own(&layout::layer_link(of, digest), digest)?;
        failpoint!(UploadLinked);
        self.cancel_upload(of, id)?;
        Ok(Committed::Blob)
    }

    /// Removes what is left of an upload.
    pub fn cancel_upload(&self, of: &Repository, id: &UploadId) -> Result<(), StoreError> {
        let folder = self.root.join(layout::upload(of, id));
        match fs::remove_dir_all(&folder) {
            Err(e) if !absent(&e) => Err(StoreError::new("remove", &folder, e)),
            _ => Ok(()),
        }
    }

    /// Removes the uploads that were given up, those to own repositories or to any, and says how
    /// many.
    pub fn remove_stale_uploads(&self, now: SystemTime, any: bool) -> Result<u64, StoreError> {
        let repositories = if any {
            self.repositories_with(&layout::repositories(), "_uploads", &Page::all())?
        } else {
            self.own_repositories()
        };
        let stale = self.stale_uploads(repositories, now)?;
        for (repository, id, _) in &stale {
            self.cancel_upload(repository, id)?;
        }
        Ok(stale.len() as u64)
    }

    /// The uploads to these repositories that were given up, and the bytes of each.
    pub(super) fn stale_uploads(
        &self,
        repositories: Vec<Repository>,
        now: SystemTime,
    ) -> Result<Vec<(Repository, UploadId, u64)>, StoreError> {
        let mut stale = Vec::new();
        for repository in repositories {
            for name in self.list(&layout::uploads(&repository))? {
                let Ok(id) = name.parse::<UploadId>() else {
                    continue;
                };
                // One that has ended since is a blob, or nothing.
                let data = self.root.join(layout::upload_data(&repository, &id));
                let folder = self.root.join(layout::upload(&repository, &id));
                let bytes = fs::metadata(&data);
                let grew = [data, folder].iter().find_map(|path| {
                    let metadata = fs::metadata(path).ok()?;
                    metadata.modified().ok()
                });
                let bytes = bytes.map_or(0, |metadata| metadata.len());
                let age = grew.and_then(|grew| now.duration_since(grew).ok());
                if age.is_some_and(|age| age > UPLOAD_STALE) {
                    stale.push((repository.clone(), id, bytes));
                }
            }
        }
        Ok(stale)
    }
}

fn hash(mut file: File, path: &Path, algorithm: Algorithm) -> Result<Session, StoreError> {
    let mut session = Session::new(algorithm);
    let mut buffer = vec![0; READ];
    loop {
        let read = file.read(&mut buffer);
        match read.map_err(|e| StoreError::new("read", path, e))? {
            0 => return Ok(session),
            read => {
                session.hasher.update(&buffer[..read]);
                session.length += read as u64;
            }
        }
    }
}

impl Upload {
    /// The file that holds what is there.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The digest of what is there, which is read for that where it was hashed otherwise.
    fn digest(&self, algorithm: Algorithm) -> Result<Digest, StoreError> {
        if self.session.hasher.algorithm() == algorithm {
            return Ok(self.session.hasher.clone().finish());
        }
        let opened = File::open(&self.path);
        let whole = opened.map_err(|e| StoreError::new("open", &self.path, e))?;
        Ok(hash(whole, &self.path, algorithm)?.hasher.finish())
    }

    /// Appends all of `pieces`, or none of them.
    fn append(&mut self, pieces: &[Bytes]) -> Result<(), StoreError> {
        let mut at = self.session.length;
        for piece in pieces {
            if let Err(error) = self.file.write_all_at(piece, at) {
                // Not to take the room that it did not suffice for; the next write cuts it as well.
                let _ = self.file.set_len(self.session.length);
                return Err(StoreError::new("write", &self.path, error));
            }
            at += piece.len() as u64;
        }
        for piece in pieces {
            self.session.hasher.update(piece);
        }
        self.session.length = at;
        failpoint!(UploadBegun);
        Ok(())
    }

    /// Forgets all but the first bytes, which were there when `session` was.
    fn reset(&mut self, session: Session) -> Result<(), StoreError> {
        let cut = self.file.set_len(session.length);
        cut.map_err(|e| StoreError::new("cut", &self.path, e))?;
        self.session = session;
        Ok(())
    }
}

/// For async callers, as all of [`Store`] is.
impl Store {
    /// Makes room for what a client is going to send.
    pub async fn begin_upload(&self, of: &Repository, id: UploadId) -> Result<(), StoreError> {
        let of = of.clone();
        self.run(move |store| store.begin_upload(&of, &id)).await
    }

    /// What is there of an upload that this process knows nothing of; `None` where there is none.
    pub async fn find_upload(
        &self,
        of: &Repository,
        id: UploadId,
        algorithm: Algorithm,
    ) -> Result<Option<Session>, StoreError> {
        let of = of.clone();
        self.run(move |store| store.find_upload(&of, &id, algorithm))
            .await
    }

    /// Whether there is such an upload.
    pub async fn has_upload(&self, of: &Repository, id: UploadId) -> Result<bool, StoreError> {
        let of = of.clone();
        self.run(move |store| {
            let path = store.root.join(layout::upload_data(&of, &id));
            path.try_exists()
                .map_err(|e| StoreError::new("read", &path, e))
        })
        .await
    }

    /// Opens an upload to go on with it; `None` where it is gone.
    pub async fn open_upload(
        &self,
        of: &Repository,
        id: UploadId,
        session: Session,
    ) -> Result<Option<Upload>, StoreError> {
        let of = of.clone();
        self.run(move |store| store.open_upload(&of, &id, session))
            .await
    }

    /// Appends all of `pieces`, or none of them; gives the upload back, and why it did not take them.
    pub async fn append_upload(
        &self,
        mut upload: Upload,
        pieces: Vec<Bytes>,
    ) -> Result<(Upload, Option<(Vec<Bytes>, StoreError)>), StoreError> {
        self.run(move |_| {
            let refused = upload.append(&pieces).err();
            Ok((upload, refused.map(|error| (pieces, error))))
        })
        .await
    }

    /// Forgets what was appended since `session`.
    pub async fn reset_upload(
        &self,
        mut upload: Upload,
        session: Session,
    ) -> Result<Upload, StoreError> {
        self.run(move |_| upload.reset(session).map(|()| upload))
            .await
    }

    /// The digest of what is there of an upload.
    pub async fn digest_upload(
        &self,
        upload: Upload,
        algorithm: Algorithm,
    ) -> Result<(Upload, Digest), StoreError> {
        self.run(move |_| {
            let digest = upload.digest(algorithm)?;
            Ok((upload, digest))
        })
        .await
    }

    /// Makes an upload a blob of a repository, if its bytes are those of `digest`.
    pub async fn commit_upload(
        &self,
        of: &Repository,
        id: UploadId,
        upload: Upload,
        digest: &Digest,
    ) -> Result<Committed, StoreError> {
        let (of, digest) = (of.clone(), digest.clone());
        self.run(move |store| store.commit_upload(&of, &id, upload, &digest))
            .await
    }

    /// Removes what is left of an upload.
    pub async fn cancel_upload(&self, of: &Repository, id: UploadId) -> Result<(), StoreError> {
        let of = of.clone();
        self.run(move |store| store.cancel_upload(&of, &id)).await
    }

    /// Removes the uploads that were given up, those to own repositories or to any, and says how
    /// many.
    pub async fn remove_stale_uploads(&self, any: bool) -> Result<u64, StoreError> {
        self.run(move |store| store.remove_stale_uploads(SystemTime::now(), any))
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upload_has_a_uuid_and_nothing_else_for_a_name() {
        let id = UploadId::random().unwrap();
        let text = id.to_string();
        assert_eq!(text.parse(), Ok(id));
        assert_eq!((text.len(), &text[14..15]), (36, "4"), "{text}");
        assert_ne!(UploadId::random().unwrap(), id);
        for bad in [
            "",
            "..",
            "1",
            &text.to_uppercase(),
            &text.replace('-', ""),
            &format!("{text}/a"),
        ] {
            if *bad != text {
                assert_eq!(bad.parse::<UploadId>(), Err(NoUpload), "{bad}");
            }
        }
    }
}
