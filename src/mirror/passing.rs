//! A blob on its way to one reader, while the store can't keep it.
//!
//! Every reader asks the upstream for what it has not had yet, and goes on where that breaks, as a
//! download does.

use bytes::Bytes;

use super::download::{BREAKS, pause};
use super::{Mirror, MirrorError, Source, blob_error};
use crate::oci::{Digest, Hasher};
use crate::upstream::{BlobBody, UpstreamError};

/// The rest of a blob, from an offset on.
pub(super) struct Passing {
    mirror: Mirror,
    source: Source,
    digest: Digest,
    /// The offset of the next byte to arrive.
    at: u64,
    total: Option<u64>,
    body: Option<Arriving>,
    /// Has taken all before `at`, where the whole is to be verified.
    hasher: Option<Hasher>,
    /// What arrived last, if it may be the end of what has to be verified first.
    held: Option<Bytes>,
}

struct Arriving {
    body: BlobBody,
    /// Bytes that the reader has had already, from an upstream without ranges.
    skip: u64,
}

impl Passing {
    pub(super) fn new(
        mirror: &Mirror,
        source: &Source,
        digest: &Digest,
        at: u64,
        total: Option<u64>,
    ) -> Self {
        Self {
            mirror: mirror.clone(),
            source: source.clone(),
            digest: digest.clone(),
            at,
            total,
            body: None,
            hasher: None,
            held: None,
        }
    }

    /// Gives the last piece only when the whole has been verified; `hasher` has taken what came
    /// before.
    pub(super) fn verify(&mut self, hasher: Hasher) {
        self.hasher = Some(hasher);
    }

    /// Asks the upstream, so that its refusal is an error and not an answer that breaks off.
    pub(super) async fn open(&mut self) -> Result<(), MirrorError> {
        match self.connect().await? {
            Ok(_) => Ok(()),
            Err(error) => Err(blob_error(error)),
        }
    }

    /// The next piece, never empty; `None` at the end. The end of a blob that is to be verified and
    /// is wrong is an error.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, MirrorError> {
        loop {
            let piece = self.receive().await?;
            let Some(hasher) = &mut self.hasher else {
                return Ok(piece);
            };
            if let Some(piece) = piece {
                hasher.update(&piece);
                if let Some(before) = self.held.replace(piece) {
                    return Ok(Some(before));
                }
                continue;
            }
            let found = self.hasher.take().map(Hasher::finish);
            if found.as_ref() != Some(&self.digest) {
                tracing::warn!(
                    repository = %self.source.stored, digest = %self.digest,
                    "what passes through does not match its digest"
                );
                return Err(self.source.mismatch(&self.digest));
            }
            return Ok(self.held.take());
        }
    }

    /// What arrives next, by another request where it breaks off.
    async fn receive(&mut self) -> Result<Option<Bytes>, MirrorError> {
        let mut breaks = 0;
        loop {
            let error = match self.attempt().await? {
                Ok(piece) => return Ok(piece),
                Err(error) => error,
            };
            self.body = None;
            breaks += 1;
            let hopeless = error.is_final() || matches!(error, UpstreamError::Protocol { .. });
            if hopeless || breaks >= BREAKS {
                return Err(blob_error(error));
            }
            tokio::time::sleep(pause(breaks)).await;
        }
    }

    async fn attempt(&mut self) -> Result<Result<Option<Bytes>, UpstreamError>, MirrorError> {
        if self.total.is_some_and(|total| self.at >= total) {
            return Ok(Ok(None));
        }
        match self.connect().await? {
            Ok(true) => {}
            Ok(false) => return Ok(Ok(None)),
            Err(error) => return Ok(Err(error)),
        }
        let upstream = &self.source.upstream;
        let what = format!("the blob {}", self.digest);
        let idle = upstream.timeouts().idle;
        while let Some(Arriving { body, skip }) = &mut self.body {
            let Ok(next) = tokio::time::timeout(idle, body.next()).await else {
                return Ok(Err(upstream.timeout_error(&what, idle)));
            };
            let mut piece = match next {
                None if self.total.is_some_and(|total| self.at < total) => {
                    return Ok(Err(upstream.transport(&what, "it ended early".to_owned())));
                }
                None => break,
                Some(Err(error)) => return Ok(Err(upstream.transport_error(&what, &*error))),
                Some(Ok(piece)) => piece,
            };
            self.mirror
                .0
                .metrics
                .fetched_bytes
                .inc_by(piece.len() as u64);
            let passed = usize::try_from(*skip).map_or(piece.len(), |skip| skip.min(piece.len()));
            *skip -= passed as u64;
            let piece = piece.split_off(passed);
            if piece.is_empty() {
                continue;
            }
            self.at += piece.len() as u64;
            if self.total.is_some_and(|total| self.at > total) {
                return Err(self.source.mismatch(&self.digest));
            }
            return Ok(Ok(Some(piece)));
        }
        Ok(Ok(None))
    }

    /// Asks the upstream for what is left, unless it is sending that already; `false` where nothing
    /// is.
    async fn connect(&mut self) -> Result<Result<bool, UpstreamError>, MirrorError> {
        if self.body.is_some() {
            return Ok(Ok(true));
        }
        let Source { upstream, name, .. } = &self.source;
        let asked = upstream.blob(name, &self.digest, self.at).await;
        let fetched = match self.mirror.learn(&self.source, asked).await {
            Ok(Some(fetched)) => fetched,
            Ok(None) => return Ok(Ok(false)),
            Err(error) => return Ok(Err(error)),
        };
        // An upstream that changes its mind about a blob's size is wrong about one of them.
        if let (Some(known), Some(said)) = (self.total, fetched.total)
            && known != said
        {
            return Err(self.source.mismatch(&self.digest));
        }
        self.total = self.total.or(fetched.total);
        self.body = Some(Arriving {
            body: fetched.body,
            skip: self.at - fetched.offset,
        });
        Ok(Ok(true))
    }
}
