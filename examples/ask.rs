//! Forks a pack and asks its copy: `cargo run --release --example ask -- PACK CODE`. PACK is all that `forkd fork` takes.

use std::error::Error;

use forkd_engine::fork::ask::ChildRequest;
use forkd_engine::fork::quiet::QuietCaller;
use forkd_engine::fork::run::{ForkRequest, fork};
use forkd_engine::local::paths::Paths;
use forkd_engine::target::Target;
use forkd_vmm::zygote::Zygote;

fn main() -> Result<(), Box<dyn Error>> {
    // Machines are forked from this process, which must be split off while there is one thread.
    let zygote = Zygote::start()?;
    let arguments: Vec<String> = std::env::args().collect();
    let [_, pack, code] = &arguments[..] else { return Err("usage: ask PACK CODE".into()) };
    let state = std::env::temp_dir().join("forkd-ask");
    let below = |name: &str| state.join(name);
    let paths = Paths { data: below("data"), cache: below("cache"), runtime: below("run") };
    let target = Target::parse(&paths, pack, None);

    let request = ForkRequest::new(target, pack, ChildRequest::Eval(code.clone()));
    let caller = QuietCaller::default();
    let forked = fork(&paths, &zygote, request, &caller)?;
    for child in &forked.report.children {
        let answer = child.answer.as_deref().or(child.error.as_deref()).unwrap_or_default();
        println!("{}: {answer}", child.id);
    }
    forked.end();
    Ok(())
}
