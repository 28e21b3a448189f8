//! From an opened pack or a snapshot's directory to a template, and to one that lacks nothing.

use crate::fork::template::{Template, TemplateError};
use crate::local::lineage::Lineage;
use crate::local::paths::Paths;
use crate::progress::{Amount, Progress, follow};
use crate::target::{self, DEMAND_DEADLINE, OpenOptions};
use forkd_fs::cache::ChunkCache;
use forkd_fs::store::{ReadError, Store};
use forkd_vmm::kvm::KvmKind;
use std::path::Path;
use std::sync::Arc;
use tokio::runtime::Handle;

/// Opens the machine of a pack. From then on its memory may be waited for longer than the pack's opening.
pub fn open_pack(runtime: &Handle, store: Arc<Store>) -> Result<Template, TemplateError> {
    let opening = Template::open_pack(store.clone(), runtime.clone(), KvmKind::detect());
    let opened = runtime.block_on(opening);
    store.set_demand_deadline(DEMAND_DEADLINE);
    opened
}

/// A machine of a snapshot's directory.
pub struct OpenedSnapshot {
    /// The machine.
    pub template: Template,
    /// The chunk cache that its base uses; to be flushed before the process exits.
    pub cache: Option<Arc<ChunkCache>>,
}

/// Opens the machine in a snapshot's directory. `runtime` is asked for only where its base is a pack.
pub fn open_snapshot<E: From<TemplateError>>(
    paths: &Paths,
    dir: &Path,
    options: OpenOptions,
    runtime: impl FnOnce() -> Result<Handle, E>,
) -> Result<OpenedSnapshot, E> {
    let lineage = Lineage::read(dir).map_err(TemplateError::from)?;
    let base = lineage.and_then(|lineage| lineage.base);
    let Some((base, pack)) = base.and_then(|base| base.pack.clone().map(|pack| (base, pack))) else {
        return Ok(OpenedSnapshot { template: Template::open_local(dir, KvmKind::detect())?, cache: None });
    };
    let runtime = runtime()?;
    let opening = target::open_base(paths, &base.name, &pack, options);
    let (store, cache) = runtime.block_on(opening).map_err(TemplateError::from)?;
    let opening = Template::open_on_pack(dir, store.clone(), runtime.clone(), KvmKind::detect());
    let template = runtime.block_on(opening)?;
    store.set_demand_deadline(DEMAND_DEADLINE);
    Ok(OpenedSnapshot { template, cache })
}

/// Downloads all that a template lacks, which is shown as `what`. Returns whether nothing is missing any more.
pub fn download(
    runtime: &Handle,
    template: &mut Template,
    what: &str,
    progress: &dyn Progress,
) -> Result<bool, ReadError> {
    let task = progress.begin(what, Amount::Bytes(template.progress().bytes_total));
    let filling = template.fill(std::future::ready(()));
    let complete = runtime.block_on(follow(&*task, filling, || template.progress().bytes_fetched))?;
    if complete {
        template.set_complete();
    }
    Ok(complete)
}
