//! Single flight: who is fetching which frame, so that everyone else who wants it waits for that instead of asking
//! again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use tokio::sync::watch;

use super::error::ReadError;
use crate::source::Priority;

/// What a flight ends in.
pub(super) type Outcome = Result<Bytes, ReadError>;

/// The frames being fetched, by record number.
#[derive(Debug, Default)]
pub(super) struct Flights(Mutex<HashMap<u32, Flight>>);

#[derive(Debug)]
struct Flight {
    priority: Priority,
    /// Tells a flight from one that overtook it.
    number: u64,
    landing: watch::Receiver<Option<Outcome>>,
}

/// What asking for a frame gives: either the caller has to fetch it, or someone does.
#[derive(Debug)]
pub(super) enum Entry {
    /// Fetch it and land the result here.
    Lead(Lead),
    /// Someone is fetching it.
    Join(Waiter),
}

/// The duty to fetch one frame. Dropped without landing, it sends the waiters off to try themselves.
#[derive(Debug)]
pub(super) struct Lead {
    flights: Arc<Flights>,
    record: u32,
    number: u64,
    landing: watch::Sender<Option<Outcome>>,
}

/// The wait for a frame someone else fetches.
#[derive(Debug)]
pub(super) struct Waiter {
    priority: Priority,
    landing: watch::Receiver<Option<Outcome>>,
}

impl Flights {
    /// Joins the flight for `record`, or starts one. `overtake` starts one also beside a prefetch, which then lands for
    /// those who joined it earlier.
    pub(super) fn enter(self: &Arc<Self>, record: u32, priority: Priority, overtake: bool) -> Entry {
        let mut flights = self.0.lock().expect("no panics while held");
        let running = flights.get(&record);
        if let Some(flight) = running.filter(|flight| !(overtake && flight.priority.is_ahead())) {
            return Entry::Join(Waiter { priority: flight.priority, landing: flight.landing.clone() });
        }
        let number = running.map_or(0, |flight| flight.number + 1);
        let (sender, landing) = watch::channel(None);
        flights.insert(record, Flight { priority, number, landing });
        Entry::Lead(Lead { flights: self.clone(), record, number, landing: sender })
    }
}

impl Lead {
    /// The record to fetch.
    pub(super) fn record(&self) -> u32 {
        self.record
    }

    /// A place among those who wait for this flight.
    pub(super) fn waiter(&self, priority: Priority) -> Waiter {
        Waiter { priority, landing: self.landing.subscribe() }
    }

    /// Hands the result to everyone waiting. Whatever later readers should find must be in its place before.
    pub(super) fn land(self, outcome: Outcome) {
        self.landing.send_replace(Some(outcome));
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        let mut flights = self.flights.0.lock().expect("no panics while held");
        if flights.get(&self.record).is_some_and(|flight| flight.number == self.number) {
            flights.remove(&self.record);
        }
    }
}

impl Waiter {
    /// Whether the frame is being fetched ahead rather than because someone waits for it.
    pub(super) fn is_ahead(&self) -> bool {
        self.priority.is_ahead()
    }

    /// The result; `None` when the fetching was abandoned.
    pub(super) async fn landed(mut self) -> Option<Outcome> {
        self.landing.wait_for(Option::is_some).await.ok()?.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lead(entry: Entry) -> Lead {
        match entry {
            Entry::Lead(lead) => lead,
            Entry::Join(_) => panic!("someone else leads"),
        }
    }

    fn join(entry: Entry) -> Waiter {
        match entry {
            Entry::Join(waiter) => waiter,
            Entry::Lead(_) => panic!("nobody leads"),
        }
    }

    #[tokio::test]
    async fn many_wait_for_one() {
        let flights = Arc::new(Flights::default());
        let leader = lead(flights.enter(7, Priority::Demand, false));
        let waiters: Vec<_> = (0..3).map(|_| join(flights.enter(7, Priority::Demand, true))).collect();
        leader.land(Ok(Bytes::from_static(b"x")));
        for waiter in waiters {
            assert_eq!(waiter.landed().await.unwrap().unwrap(), "x");
        }
        lead(flights.enter(7, Priority::Demand, false));
    }

    #[tokio::test]
    async fn an_abandoned_flight_sends_its_waiters_off() {
        let flights = Arc::new(Flights::default());
        let leader = lead(flights.enter(7, Priority::Prefetch, false));
        let waiter = join(flights.enter(7, Priority::Demand, false));
        drop(leader);
        assert!(waiter.landed().await.is_none());
    }

    #[tokio::test]
    async fn demand_overtakes_prefetch_once() {
        let flights = Arc::new(Flights::default());
        let prefetch = lead(flights.enter(7, Priority::Prefetch, false));
        let patient = join(flights.enter(7, Priority::Demand, false));
        let demand = lead(flights.enter(7, Priority::Demand, true));
        let second = join(flights.enter(7, Priority::Demand, true));
        assert!(patient.is_ahead() && !second.is_ahead());
        prefetch.land(Ok(Bytes::from_static(b"late")));
        assert_eq!(patient.landed().await.unwrap().unwrap(), "late");
        // The overtaken flight does not take the newer one with it.
        join(flights.enter(7, Priority::Demand, true));
        demand.land(Ok(Bytes::from_static(b"new")));
        assert_eq!(second.landed().await.unwrap().unwrap(), "new");
    }
}
