//! Redirects: followed once, remembered, asked for again once when what they led to is refused, and bounded.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forkd_fs::source::{HttpError, Priority, Source, SourceError};

mod support;
use support::server::{Fault, Server};
use support::{http, noise, source};

/// A host that redirects, and the one it redirects to, which takes only requests with the newest key.
struct Hosts {
    front: Server,
    back: Server,
    object: Vec<u8>,
}

impl Hosts {
    async fn start() -> Self {
        let object = noise(1, 200_000);
        let hosts = Self {
            front: Server::start(Vec::new()).await,
            back: Server::start(object.clone()).await,
            object,
        };
        hosts.sign("one");
        hosts
    }

    /// From now on this is the key that redirects carry and that is taken.
    fn sign(&self, key: &str) {
        self.front.fail_always(Fault::Redirect(format!("{}?Signature={key}", self.back.url())));
        self.back.set_key(&format!("Signature={key}"));
    }

    fn source(&self) -> Arc<Source> {
        Arc::new(source(&http(), &self.front.url(), None))
    }

    async fn check(&self, source: &Source, at: usize) {
        let bytes = source.read_at(at as u64, 1000, Priority::Demand).await.unwrap();
        assert_eq!(bytes, self.object[at..at + 1000]);
    }
}

fn http_error(error: SourceError) -> HttpError {
    let SourceError::Http(error) = error else { panic!("{error:?}") };
    error
}

#[tokio::test]
async fn a_redirect_is_followed_once_and_remembered() {
    let hosts = Hosts::start().await;
    let source = hosts.source();
    for at in 0..10 {
        hosts.check(&source, at * 1000).await;
    }
    assert_eq!((hosts.front.request_count(), hosts.back.request_count()), (1, 10));
    assert_eq!(source.counters().requests, 11);
}

#[tokio::test]
async fn an_expired_target_is_resolved_again_by_one_reader_for_all() {
    let hosts = Hosts::start().await;
    let source = hosts.source();
    hosts.check(&source, 0).await;
    hosts.sign("two");
    // Slow enough that all readers have met the refusal before the first has found the new way.
    hosts.front.set_latency(Duration::from_millis(100));
    let reads = (0..16).map(|reader| hosts.check(&source, reader * 5000));
    futures_util::future::join_all(reads).await;
    assert_eq!(hosts.front.request_count(), 2, "one for the first way, one for the second");
    assert_eq!(hosts.back.request_count(), 1 + 16 + 16, "each reader was refused once");
}

#[tokio::test]
async fn a_target_that_stays_refused_is_asked_for_once_again_and_denied() {
    for (status, denied) in [(401, true), (403, true), (404, false), (410, false)] {
        let hosts = Hosts::start().await;
        let source = hosts.source();
        hosts.check(&source, 0).await;
        hosts.back.fail_always(Fault::Status(status, None));
        hosts.front.set_latency(Duration::from_millis(100));
        let reads = (0..8).map(|_| source.read_at(0, 10, Priority::Demand));
        for failed in futures_util::future::join_all(reads).await {
            let error = http_error(failed.unwrap_err());
            let expected = match &error {
                HttpError::Denied { status: got, .. } => denied && *got == status,
                HttpError::NotFound { status: got, .. } => !denied && *got == status,
                _ => false,
            };
            assert!(expected, "{status}: {error:?}");
            assert!(!format!("{error} {error:?}").contains("Signature"), "{error:?}");
        }
        assert_eq!(hosts.front.request_count(), 2, "{status}");
        // A later read starts anew, and finds the way once there is one.
        hosts.back.fail_always(Fault::Fine);
        hosts.check(&source, 3000).await;
    }
}

#[tokio::test]
async fn a_target_that_is_gone_is_replaced() {
    let mut hosts = Hosts::start().await;
    let source = hosts.source();
    hosts.check(&source, 0).await;
    hosts.back.stop().await;
    hosts.back = Server::start(hosts.object.clone()).await;
    hosts.sign("two");
    hosts.check(&source, 1000).await;
    assert_eq!(hosts.front.request_count(), 2);
}

#[tokio::test]
async fn a_redirect_that_leads_astray_is_asked_again() {
    let (hosts, portal) = (Hosts::start().await, Server::start(Vec::new()).await);
    portal.fail_always(Fault::Page);
    let source = source(&http(), &hosts.front.url(), Some(200_000));
    hosts.check(&source, 0).await;
    // The way is forgotten when what is there answers wrongly, and for a while leads to the portal.
    hosts.back.fail_next([Fault::Page]);
    hosts.front.fail_next([Fault::Redirect(portal.url())]);
    hosts.check(&source, 1000).await;
    let asked = (hosts.front.request_count(), hosts.back.request_count(), portal.request_count());
    assert_eq!(asked, (3, 3, 1));
}

#[tokio::test]
async fn no_error_and_no_description_shows_a_signature() {
    let faults =
        [Fault::Status(418, None), Fault::WrongRange, Fault::Gzip, Fault::Status(403, None), Fault::Reset];
    for fault in faults {
        let hosts = Hosts::start().await;
        let source = hosts.source();
        hosts.back.fail_always(fault.clone());
        let error = source.read_at(0, 10, Priority::Demand).await.unwrap_err();
        let shown = format!("{error} {error:?} {source:?} {}", source.describe());
        assert!(!shown.contains("Signature"), "{fault:?}: {shown}");
    }
}

#[tokio::test]
async fn loops_and_long_chains_end_at_once() {
    let (a, b) = (Server::start(Vec::new()).await, Server::start(Vec::new()).await);
    a.fail_always(Fault::Redirect(b.url()));
    b.fail_always(Fault::Redirect(a.url()));
    let started = Instant::now();
    let failed = http().get(&a.url(), 100).await.unwrap_err();
    assert!(matches!(failed, HttpError::Redirects { .. }), "{failed}");
    assert_eq!((a.request_count(), b.request_count()), (1, 1), "the second visit is not made");

    // Ten redirects are followed, eleven are not.
    for (redirects, fine) in [(10, true), (11, false)] {
        let server = Server::start(b"x".to_vec()).await;
        server.fail_next((0..redirects).map(|step| Fault::Redirect(format!("/step{step}"))));
        assert_eq!(http().get(&server.url(), 100).await.is_ok(), fine, "{redirects}");
    }
    let server = Server::start(Vec::new()).await;
    server.fail_always(Fault::Redirect("file:///etc/passwd".into()));
    assert!(matches!(http().get(&server.url(), 100).await, Err(HttpError::Url { .. })));
    assert!(started.elapsed() < Duration::from_secs(1));
}
