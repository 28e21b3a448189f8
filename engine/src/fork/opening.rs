//! From an opened pack to a template, and to one that lacks nothing.

use crate::fork::template::{Template, TemplateError};
use crate::progress::{Amount, Progress, follow};
use crate::target::DEMAND_DEADLINE;
use forkd_fs::store::{ReadError, Store};
use forkd_vmm::kvm::KvmKind;
use std::sync::Arc;
use tokio::runtime::Handle;

/// Opens the machine of a pack. From then on its memory may be waited for longer than the pack's opening.
pub fn open_pack(runtime: &Handle, store: Arc<Store>) -> Result<Template, TemplateError> {
    let opening = Template::open_pack(store.clone(), runtime.clone(), KvmKind::detect());
    let opened = runtime.block_on(opening);
    store.set_demand_deadline(DEMAND_DEADLINE);
    opened
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
