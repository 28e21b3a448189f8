//! What is asked of a run directory, and what comes of names from outside.

use super::*;
use crate::local::lifetime::OnTimeout;

struct Fork;

impl ForkControl for Fork {
    fn status(&self) -> ForkStatus {
        let (pack, children) = ("p".to_owned(), Vec::new());
        ForkStatus { pack, forked_from: None, bytes_fetched: 1, bytes_total: 2, children }
    }

    fn kill(&self, child: Option<&str>) -> usize {
        child.map_or(0, str::len)
    }

    fn pause(&self, child: Option<&str>) -> usize {
        child.map_or(10, str::len)
    }

    fn resume(&self, _: Option<&str>) -> usize {
        20
    }

    fn gateway(&self, _: &str) -> Option<GatewayStatus> {
        None
    }

    fn set_lifetime(&self, _: Option<&str>, lifetime: Option<Lifetime>) -> usize {
        lifetime.map_or(0, |lifetime| lifetime.time.subsec_millis() as usize)
    }

    fn branch(&self, request: &BranchRequest) -> Result<Branched, String> {
        Err(format!("{} is not there", request.child))
    }

    fn snapshot(&self, request: &SnapshotRequest) -> Result<TakenSnapshot, String> {
        Err(format!("{} cannot be written", request.into.display()))
    }

    fn pause_to_disk(&self, _: Option<&str>) -> Result<PausedToDisk, String> {
        Ok(PausedToDisk { children: 3, bytes: 4096 })
    }

    fn resume_from_disk(&self, child: Option<&str>) -> Result<usize, String> {
        child.map_or(Ok(2), |child| Err(format!("{child} did not come back")))
    }
}

fn paths(dir: &Path) -> Paths {
    Paths { data: dir.join("data"), cache: dir.join("cache"), runtime: dir.join("run") }
}

#[test]
fn a_fork_answers_while_it_lives_and_is_removed_when_dead() {
    let dir = tempfile::tempdir().unwrap();
    let paths = paths(dir.path());
    let run = RunDir::create(&paths).unwrap();
    let listener = run.listen().unwrap();
    let labels = BTreeMap::from([("of".to_owned(), "whom".to_owned())]);
    run.note_labels(&labels).unwrap();
    let id = format!("{}-1", run.id());
    File::create(run.socket(&id)).unwrap();
    let fork = ForkDir::of_child(&paths, &id).unwrap();
    assert_eq!(fork.labels().unwrap(), labels);
    std::thread::scope(|scope| {
        scope.spawn(|| (0..12).for_each(|_| run.answer(listener.accept().unwrap().0, &Arc::new(Fork))));
        assert_eq!(fork.status().unwrap().pack, "p");
        assert_eq!(fork.kill(Some("abc")).unwrap(), 3);
        assert_eq!((fork.pause(None).unwrap(), fork.pause(Some("ab")).unwrap()), (10, 2));
        assert_eq!(fork.resume(None).unwrap(), 20);
        assert_eq!(fork.pause_to_disk(None).unwrap(), PausedToDisk { children: 3, bytes: 4096 });
        assert_eq!(fork.resume_from_disk(None).unwrap(), 2);
        let refused = fork.resume_from_disk(Some("c-1")).unwrap_err();
        assert!(matches!(&refused, RunDirError::Refused { error } if error == "c-1 did not come back"));
        assert_eq!(fork.gateway("abc").unwrap(), None);
        let lifetime = Lifetime { time: Duration::from_millis(1234), then: OnTimeout::Pause };
        assert_eq!(fork.set_lifetime(None, Some(lifetime)).unwrap(), 234);
        let request = BranchRequest { child: "abc".to_owned(), environments: Vec::new() };
        let refused = fork.branch(&request).unwrap_err();
        assert!(
            matches!(&refused, RunDirError::Refused { error } if error == "abc is not there"),
            "{refused:?}"
        );
        let (child, tag, into) = ("abc".to_owned(), "t".to_owned(), "/nowhere".into());
        let refused = fork.snapshot(&SnapshotRequest { child, tag, into }).unwrap_err();
        assert_eq!(refused.to_string(), "/nowhere cannot be written");
    });
    assert!(!fork.remove_if_dead().unwrap());
    drop((run, listener));
    assert!(ForkDir::all(&paths).unwrap().is_empty(), "a fork that ends removes its directory");
    // What a killed one leaves: a lock that nobody holds.
    fs::create_dir(&fork.path).unwrap();
    File::create(fork.path.join(LOCK)).unwrap();
    assert!(matches!(fork.status(), Err(RunDirError::Dead { .. })));
    assert!(fork.remove_if_dead().unwrap());
    assert!(ForkDir::all(&paths).unwrap().is_empty());
}

#[test]
fn a_query_that_is_not_known_is_an_error_at_once_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunDir::create(&paths(dir.path())).unwrap();
    let listener = run.listen().unwrap();
    let fork = ForkDir::named(&paths(dir.path()), run.id()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            run.answer(listener.accept().unwrap().0, &Arc::new(Fork));
            // As a forkd does that knows neither the query nor what to say.
            let mut line = String::new();
            BufReader::new(listener.accept().unwrap().0).read_line(&mut line).unwrap();
        });
        let mut stream = UnixStream::connect(fork.path.join(CONTROL)).unwrap();
        writeln!(stream, "{{\"dance\":null}}").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer.trim(), UNKNOWN_QUERY);
        assert!(matches!(fork.pause(None), Err(RunDirError::OtherVersion { .. })));
    });
}

#[test]
fn names_from_outside_cannot_leave_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    for id in ["", ".", "..", "abc", "a/b", "abc-1"] {
        let named = ForkDir::named(&paths(dir.path()), id);
        assert!(matches!(named, Err(RunDirError::UnknownFork { .. })), "{id}");
    }
    for id in ["", "-", "../..-1", "abc", "a/b-1", "abc-1/../.."] {
        assert!(matches!(ForkDir::of_child(&paths(dir.path()), id), Err(RunDirError::UnknownChild { .. })));
    }
}
