//! The pull-through mirror: answers from the store, and fills a miss once for everybody.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use quick_cache::sync::Cache;

mod changes;
mod content;
mod describe;
mod download;
mod evict;
mod fill;
mod flight;
mod freshness;
mod passing;
mod referrers;
mod shared;
mod visibility;

pub use content::{BlobContent, Piece};
pub use describe::Described;
pub use freshness::Served;
pub use referrers::Referrers;

use changes::{Changes, Place};
use evict::Evictions;
use fill::Fills;
use flight::Flights;
use freshness::Resolution;
use shared::Shared;
use visibility::Wanted;

use crate::config::{CacheLimit, Freshness, Role, Serving, Storage};
use crate::metrics::Metrics;
use crate::oci::{Digest, Manifest, Name, Reference, RegistryHost, Tag};
use crate::store::layout::Repository;
use crate::store::{Page, Store, StoreError};
use crate::upstream::{Description, PUBLIC_FOR, Upstream, UpstreamError};

/// Tags asked for by HEAD that are remembered until their manifests are asked for.
const DESCRIBED: usize = 1024;

/// Something could not be served.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MirrorError {
    /// The upstream has no such blob, or does not let us see it.
    #[error("{0}")]
    BlobUnknown(UpstreamError),
    /// The upstream has no such manifest, or does not let us see it.
    #[error("{0}")]
    ManifestUnknown(UpstreamError),
    /// The upstream has no such repository, or does not let us see it.
    #[error("{0}")]
    NameUnknown(UpstreamError),
    /// A registry that this mirror was not told about.
    #[error("{host} is not mirrored here; the registries that are: {mirrored}")]
    NotMirrored {
        /// The registry that was asked for.
        host: String,
        /// Those that could be.
        mirrored: String,
    },
    /// Nothing is mirrored, and this name is not pushed here.
    #[error("{0} is not pushed to this registry (`hosted`), which asks no other one")]
    NotHosted(Name),
    /// What is stored under this name was pushed here, and is not the upstream's.
    #[error(
        "{0} was pushed to this registry, and is not mirrored: pull it by the name that `hosted` \
         has for it, or, if it is hosted no longer, from the registry itself"
    )]
    Hosted(Repository),
    /// Nothing is cached, and the upstream can't be asked now.
    #[error("nothing cached, and {0}")]
    Unavailable(UpstreamError),
    /// The upstream's manifest is larger than any that is taken.
    #[error("{0}")]
    TooLarge(UpstreamError),
    /// What the upstream sent is not what the digest says.
    #[error("{upstream} sent other bytes than {wanted} for {name}")]
    Mismatch {
        /// The registry.
        upstream: RegistryHost,
        /// The repository.
        name: Name,
        /// What was asked for.
        wanted: Digest,
    },
    /// The store failed, and the answer can't be had without it.
    #[error("{0}")]
    Store(#[from] Arc<StoreError>),
    /// The work behind the answer died; its panic is in the log.
    #[error("the download of {0} was given up")]
    Abandoned(String),
}

impl From<StoreError> for MirrorError {
    fn from(error: StoreError) -> Self {
        Self::Store(Arc::new(error))
    }
}

/// A repository of an upstream, and where its content is in the store.
#[derive(Debug, Clone)]
pub struct Source {
    /// Who is asked.
    pub upstream: Arc<Upstream>,
    /// The name it is asked for.
    pub name: Name,
    /// Its place in the store.
    pub stored: Repository,
}

impl Source {
    /// Its upstream sent something else than this.
    fn mismatch(&self, wanted: &Digest) -> MirrorError {
        MirrorError::Mismatch {
            upstream: self.upstream.registry().clone(),
            name: self.name.clone(),
            wanted: wanted.clone(),
        }
    }
}

/// What can change while the agent runs.
#[derive(Debug)]
struct Live {
    upstreams: Vec<Arc<Upstream>>,
    freshness: Freshness,
    cache_limit: CacheLimit,
}

impl Live {
    fn upstream(&self, host: &str) -> Option<Arc<Upstream>> {
        let mut upstreams = self.upstreams.iter();
        upstreams
            .find(|upstream| upstream.registry().as_str() == host)
            .cloned()
    }

    /// docker.io, or, where that is not mirrored, the first; a writer has none.
    fn default(&self) -> Option<Arc<Upstream>> {
        self.upstream(RegistryHost::DOCKER_HUB)
            .or_else(|| self.upstreams.first().cloned())
    }
}

/// The mirror. Cheap to clone; clones share everything.
#[derive(Clone)]
pub struct Mirror(Arc<Inner>);

struct Inner {
    store: Store,
    metrics: Arc<Metrics>,
    live: RwLock<Arc<Live>>,
    fills: Fills,
    evictions: Evictions,
    manifests: Flights<(Repository, Reference), Result<Arc<Manifest>, MirrorError>>,
    tags: Flights<(Repository, Tag), Resolution>,
    descriptions: Flights<(Repository, Reference), Result<Option<Description>, UpstreamError>>,
    /// The tags that were asked for by HEAD, by what they are, and when.
    described: Cache<(Repository, Digest), (Tag, Instant, SystemTime)>,
    referrers: Flights<(Repository, Digest), Result<Vec<serde_json::Value>, UpstreamError>>,
    visible: Flights<(Repository, Wanted), Result<(), UpstreamError>>,
    /// Held while it is noted who may see a repository.
    noting: tokio::sync::Mutex<()>,
    /// What this process itself has changed in the bucket.
    changes: Changes,
    /// The bucket that all mirrors of the fleet share, where there is one.
    shared: Option<Shared>,
}

impl Mirror {
    /// A mirror of the upstreams in `settings`, over `store`.
    pub fn new(settings: &Serving, store: Store, metrics: Arc<Metrics>) -> Self {
        let live = Live {
            upstreams: upstreams(settings, &[], &metrics),
            freshness: settings.freshness,
            cache_limit: settings.cache_limit,
        };
        Self(Arc::new(Inner {
            store,
            metrics,
            live: RwLock::new(Arc::new(live)),
            fills: Fills::default(),
            evictions: Evictions::default(),
            manifests: Flights::default(),
            tags: Flights::default(),
            descriptions: Flights::default(),
            described: Cache::new(DESCRIBED),
            referrers: Flights::default(),
            visible: Flights::default(),
            noting: tokio::sync::Mutex::default(),
            changes: Changes::new(settings.role),
            shared: Shared::of(settings),
        }))
    }

    /// Takes over new settings. An upstream that did not change keeps its tokens and what is known
    /// of it; what is under way goes on as it began, for those who wait for it.
    pub fn reload(&self, settings: &Serving) {
        let before = self.live();
        let live = Live {
            upstreams: upstreams(settings, &before.upstreams, &self.0.metrics),
            freshness: settings.freshness,
            cache_limit: settings.cache_limit,
        };
        let changed = |upstream| !before.upstreams.iter().any(|it| Arc::ptr_eq(it, upstream));
        let changed = live.upstreams.iter().any(changed);
        *self.0.live.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(live);
        // What an account is given now is perhaps not for whoever comes next.
        if changed {
            self.0.manifests.close();
            self.0.tags.close();
            self.0.descriptions.close();
            self.0.referrers.close();
            self.0.visible.close();
        }
    }

    fn live(&self) -> Arc<Live> {
        Arc::clone(&self.0.live.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The store behind the mirror.
    pub fn store(&self) -> &Store {
        &self.0.store
    }

    /// The upstreams, as they are now.
    pub fn upstreams(&self) -> Vec<Arc<Upstream>> {
        self.live().upstreams.clone()
    }

    /// Which upstream has a repository.
    ///
    /// `ns` is the registry that containerd and Docker name beside the path; without it, a first
    /// component that is a mirrored registry's host chooses that registry, and anything else is
    /// docker.io's, or, where docker.io is not mirrored, the first upstream's.
    pub fn source(&self, name: &Name, ns: Option<&str>) -> Result<Source, MirrorError> {
        let live = self.live();
        if let Some(bucket) = live.upstreams.first().filter(|first| first.is_bucket()) {
            return in_bucket(bucket, name, ns);
        }
        if live.upstreams.is_empty() {
            return Err(MirrorError::NotHosted(name.clone()));
        }
        let (upstream, name) = match (ns, name.first().and_then(|host| live.upstream(host))) {
            (Some(ns), _) => {
                let host: Option<RegistryHost> = ns.parse().ok();
                let upstream = host.and_then(|host| live.upstream(host.as_str()));
                let upstream = upstream.ok_or_else(|| MirrorError::NotMirrored {
                    host: ns.chars().take(80).collect(),
                    mirrored: registries(&live.upstreams),
                })?;
                (upstream, name.clone())
            }
            (None, Some(upstream)) => (upstream, name.rest().unwrap_or_else(|| name.clone())),
            (None, None) => {
                let upstream = live.default();
                let upstream = upstream.ok_or_else(|| MirrorError::NotHosted(name.clone()))?;
                (upstream, name.clone())
            }
        };
        // Docker Hub has no such names: it is another registry's image that is meant, and its place
        // in the store.
        if let Some(host) = name.first()
            && upstream.registry().is_docker_hub()
            && (host.contains('.') || host == "localhost")
        {
            return Err(MirrorError::NotMirrored {
                host: host.to_owned(),
                mirrored: registries(&live.upstreams),
            });
        }
        // Docker Hub's official images are under `library/`; people leave it out, clients add it.
        let name = match name.first() {
            None if upstream.registry().is_docker_hub() => {
                format!("library/{name}").parse().unwrap_or(name)
            }
            _ => name,
        };
        let mut stored = Repository::new(upstream.registry(), &name);
        // What is pushed here is not the upstream's, whatever it is asked for as.
        if self.0.store.is_kept(&stored) {
            return Err(MirrorError::Hosted(stored));
        }
        if upstream.settings().share_private {
            stored = stored.as_shared();
        }
        Ok(Source {
            upstream,
            name,
            stored,
        })
    }

    /// A blob, from the store or, while it arrives, from its upstream.
    pub async fn blob(&self, source: &Source, digest: &Digest) -> Result<BlobContent, MirrorError> {
        let anybody = self.admit_anybody(source, Wanted::Blob(digest.clone()));
        anybody.await.map_err(blob_error)?;
        if let Some(blob) = self.0.store.blob(digest).await? {
            self.admit(source, digest).await?;
            self.0.metrics.blob_hits.inc();
            self.share_blob(source, digest);
            return Ok(BlobContent::stored(blob));
        }
        self.0.metrics.blob_misses.inc();
        loop {
            let fill = self.0.fills.join(self, source, digest);
            let begun_by = fill.repository();
            let of_account = begun_by.is_of_account() && !source.stored.is_of_account();
            let place = Place::Blob(source.stored.clone(), digest.clone());
            let of_before = self.0.changes.since(&place, fill.begun());
            let of_another = *begun_by != source.stored || of_account || of_before;
            if of_another && !self.0.store.has_link(&source.stored, digest).await? {
                self.ask_for_blob(source, digest).await?;
            }
            match BlobContent::filling(fill).await {
                // What the upstream does not have for another repository it may have for this one,
                // and has just said so.
                Err(MirrorError::BlobUnknown(_)) if of_another => {}
                content => return content,
            }
        }
    }

    /// Records that a repository has a blob. Where that can't be, the next request asks the upstream
    /// once more, and this one goes on.
    async fn link_layer(&self, repository: &Repository, digest: &Digest) {
        let link = || self.0.store.link_layer(repository, digest);
        if let Err(error) = self.with_room(0, link).await {
            tracing::warn!(%repository, %digest, %error, "a layer could not be linked: {error}");
        }
    }

    /// The size of a blob in bytes, where it is known, without downloading it.
    pub async fn blob_size(
        &self,
        source: &Source,
        digest: &Digest,
    ) -> Result<Option<u64>, MirrorError> {
        if let Some(blob) = self.0.store.blob(digest).await? {
            let anybody = self.admit_anybody(source, Wanted::Blob(digest.clone()));
            anybody.await.map_err(blob_error)?;
            self.admit(source, digest).await?;
            self.0.metrics.blob_hits.inc();
            return Ok(Some(blob.size));
        }
        self.0.metrics.blob_misses.inc();
        match self.ask_for_blob(source, digest).await {
            Err(error @ MirrorError::Unavailable(_)) => {
                let known = self.blob_size_of_fleet(source, digest).await;
                known.ok_or(error)
            }
            asked => asked,
        }
    }

    /// Sees to it that a blob which is here, perhaps because of another repository, is also this
    /// one's, so that nobody reads a blob by knowing its digest. Only the upstream can say that: a
    /// manifest may name any digest. Where it can't be asked, a stored manifest has to do, so that
    /// images that share a layer can all be had without it.
    async fn admit(&self, source: &Source, digest: &Digest) -> Result<(), MirrorError> {
        let store = &self.0.store;
        if self.0.fills.just_verified(&source.stored, digest)
            || store.has_link(&source.stored, digest).await?
        {
            return Ok(());
        }
        let asked = Instant::now();
        match self.ask_for_blob(source, digest).await {
            Ok(_) => {
                let place = Place::Blob(source.stored.clone(), digest.clone());
                let link = || async {
                    self.link_layer(&source.stored, digest).await;
                    Ok(())
                };
                self.keep(&[place], asked, link).await?;
                Ok(())
            }
            Err(error @ MirrorError::Unavailable(_)) => {
                if self.may_be_stale(source).await
                    && store.names_layer(&source.stored, digest).await?
                {
                    return Ok(());
                }
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    /// Links, by and by, the blobs of a new manifest that are here already because of other
    /// repositories: clients that have them never ask for them here, and distribution serves only
    /// what is linked.
    async fn link_shared(&self, source: &Source, manifest: &Manifest) {
        let mut shared = Vec::new();
        for digest in &manifest.blobs {
            let here = self
                .0
                .store
                .blob(digest)
                .await
                .is_ok_and(|blob| blob.is_some());
            let linked = self.0.store.has_link(&source.stored, digest);
            if here && linked.await.is_ok_and(|linked| !linked) {
                shared.push(digest.clone());
            }
        }
        if shared.is_empty() {
            return;
        }
        let (mirror, source) = (self.clone(), source.clone());
        tokio::spawn(async move {
            for digest in shared {
                if let Err(error) = mirror.admit(&source, &digest).await {
                    tracing::debug!(repository = %source.stored, %digest, %error, "a shared blob was not linked");
                }
            }
        });
    }

    /// Where a client gets a blob from its bucket itself, where it is to be sent there; `None` where
    /// it is to be served: what is on this disk costs S3 nothing.
    pub async fn elsewhere(
        &self,
        source: &Source,
        digest: &Digest,
    ) -> Result<Option<String>, MirrorError> {
        if !source.upstream.redirects() || self.0.store.blob(digest).await?.is_some() {
            return Ok(None);
        }
        self.0.metrics.blob_misses.inc();
        self.ask_for_blob(source, digest).await?;
        let url = source.upstream.presigned(digest).await;
        url.map_err(MirrorError::Unavailable)
    }

    async fn ask_for_blob(
        &self,
        source: &Source,
        digest: &Digest,
    ) -> Result<Option<u64>, MirrorError> {
        let size = source.upstream.blob_size(&source.name, digest).await;
        self.learn(source, size).await.map_err(blob_error)
    }

    /// A page of a repository's tags: `last` excluded, at most `limit`, and whether there are more.
    /// The upstream's, or, where it can't be asked, those that are cached; then they are stale.
    pub async fn tags(
        &self,
        source: &Source,
        limit: Option<usize>,
        last: Option<&str>,
    ) -> Result<TagPage, MirrorError> {
        let asked = source.upstream.tags(&source.name, limit, last).await;
        let error = match self.learn(source, asked).await {
            Ok(page) => {
                return Ok(TagPage {
                    tags: page.tags,
                    more: page.more,
                    stale: false,
                });
            }
            Err(e) if e.is_final() => return Err(MirrorError::NameUnknown(e)),
            Err(e) => MirrorError::Unavailable(e),
        };
        if !self.may_be_stale(source).await {
            return Err(error);
        }
        let page = Page {
            after: last.unwrap_or_default().to_owned(),
            // Whether there are more is told by one more.
            limit: limit.map_or(usize::MAX, |limit| limit.saturating_add(1)),
        };
        let tags = self.0.store.tags(&source.stored, page).await?;
        let mut tags: Vec<String> = tags.iter().map(ToString::to_string).collect();
        if tags.is_empty() && last.is_none() {
            return Err(error);
        }
        self.0.metrics.stale_served.inc();
        let more = limit.is_some_and(|limit| tags.len() > limit);
        tags.truncate(limit.unwrap_or(tags.len()));
        Ok(TagPage {
            tags,
            more,
            stale: true,
        })
    }
}

/// A page of tags.
#[derive(Debug)]
pub struct TagPage {
    /// The tags.
    pub tags: Vec<String>,
    /// Whether there are more after them.
    pub more: bool,
    /// Whether they come from the cache because the upstream could not be asked.
    pub stale: bool,
}

fn blob_error(error: UpstreamError) -> MirrorError {
    if error.is_final() {
        MirrorError::BlobUnknown(error)
    } else {
        MirrorError::Unavailable(error)
    }
}

fn manifest_error(error: UpstreamError) -> MirrorError {
    if error.is_final() {
        MirrorError::ManifestUnknown(error)
    } else if matches!(error, UpstreamError::TooLarge { .. }) {
        MirrorError::TooLarge(error)
    } else {
        MirrorError::Unavailable(error)
    }
}

/// How long ago, and `None` for a time that has not come: the clock was turned back.
fn age(of: SystemTime) -> Option<Duration> {
    SystemTime::now().duration_since(of).ok()
}

/// Where a bucket has a repository: everything is under its own name, but what another registry was
/// asked for (`ns`), which is under that registry's, as a mirror keeps it.
fn in_bucket(bucket: &Arc<Upstream>, name: &Name, ns: Option<&str>) -> Result<Source, MirrorError> {
    let registry = ns.map(str::parse::<RegistryHost>).transpose();
    let refused = || MirrorError::NotMirrored {
        host: ns.unwrap_or_default().chars().take(80).collect(),
        mirrored: bucket.registry().to_string(),
    };
    let registry = registry.map_err(|_| refused())?;
    let name = match registry {
        Some(registry) if !registry.is_docker_hub() && registry != *bucket.registry() => {
            let within = format!("{registry}/{name}");
            within.parse().map_err(|_| refused())?
        }
        _ => name.clone(),
    };
    Ok(Source {
        upstream: Arc::clone(bucket),
        stored: Repository::from_path(name.to_string()),
        name,
    })
}

fn registries(upstreams: &[Arc<Upstream>]) -> String {
    let names: Vec<&str> = upstreams
        .iter()
        .map(|upstream| upstream.registry().as_str())
        .collect();
    names.join(", ")
}

/// The upstreams of `settings`, keeping those of `before` that did not change.
fn upstreams(
    settings: &Serving,
    before: &[Arc<Upstream>],
    metrics: &Arc<Metrics>,
) -> Vec<Arc<Upstream>> {
    let kept = |wanted| {
        before.iter().find(|upstream| {
            upstream.settings() == wanted
                && upstream.timeouts() == settings.timeouts
                && upstream.public_for() == settings.freshness.window.min(PUBLIC_FOR)
        })
    };
    if let Storage::S3 { bucket, .. } = &settings.storage
        && settings.role != Role::Mirror
    {
        let kept = before.iter().find(|upstream| {
            upstream.is_the_bucket(bucket) && upstream.timeouts() == settings.timeouts
        });
        let opened = || {
            let window = settings.freshness.window;
            let bucket = bucket.as_ref().clone();
            Arc::new(Upstream::of_bucket(
                bucket,
                settings.timeouts,
                window,
                metrics,
            ))
        };
        return vec![kept.cloned().unwrap_or_else(opened)];
    }
    settings
        .upstreams
        .iter()
        .map(|wanted| match kept(wanted) {
            Some(upstream) => Arc::clone(upstream),
            None => Arc::new(Upstream::new(
                wanted.clone(),
                settings.timeouts,
                settings.freshness.window,
                metrics,
            )),
        })
        .collect()
}
