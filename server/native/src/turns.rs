//! The order in which the requests of a stream are answered, whatever the order in which their answers come.

use std::collections::VecDeque;

/// What a request of a stream is answered with: a message, or the end of the stream.
pub enum Answer<M, E> {
    Message(M),
    End(E),
}

/// How a stream has ended, and the requests that nobody will hear of.
pub struct Over<E, W> {
    pub end: E,
    pub unheard: Vec<W>,
}

struct Due<M, E, W> {
    whose: W,
    answer: Option<Answer<M, E>>,
}

/// The requests of one stream that are not answered yet, in the order in which they came; `W` is whose they are.
pub struct Turns<M, E, W> {
    due: VecDeque<Due<M, E, W>>,
    /// The number of the first that is due.
    first: u64,
    /// No request enters any more, and this is the end behind the answers that are due.
    closing: Option<E>,
    is_over: bool,
}

impl<M, E, W> Default for Turns<M, E, W> {
    fn default() -> Self {
        Self { due: VecDeque::new(), first: 0, closing: None, is_over: false }
    }
}

impl<M, E, W: Clone> Turns<M, E, W> {
    /// Gives a request its turn behind all others: its number; None when none is taken any more.
    pub fn enter(&mut self, whose: W) -> Option<u64> {
        if self.is_over || self.closing.is_some() {
            return None;
        }
        self.due.push_back(Due { whose, answer: None });
        Some(self.first + self.due.len() as u64 - 1)
    }

    /// Notes the answer of a request, and sends what is due by now. A second answer has no effect.
    pub fn settle(&mut self, number: u64, answer: Answer<M, E>, mut send: impl FnMut(M)) -> Option<Over<E, W>> {
        let place = usize::try_from(number.checked_sub(self.first)?).ok()?;
        let due = self.due.get_mut(place)?;
        if self.is_over || due.answer.is_some() {
            return None;
        }
        due.answer = Some(answer);
        while let Some(Due { answer: Some(_), .. }) = self.due.front() {
            self.first += 1;
            match self.due.pop_front()?.answer? {
                Answer::Message(message) => send(message),
                Answer::End(end) => return Some(self.leave(end)),
            }
        }
        self.end_if_done()
    }

    /// Takes no more requests, and ends with this behind the answers that are due. The first of several counts.
    pub fn close(&mut self, end: E) -> Option<Over<E, W>> {
        if self.is_over || self.closing.is_some() {
            return None;
        }
        self.closing = Some(end);
        self.end_if_done()
    }

    /// Whose requests are not answered, of a stream whose client has left; it takes none any more.
    pub fn abandon(&mut self) -> Vec<W> {
        self.is_over = true;
        self.due.iter().map(|due| due.whose.clone()).collect()
    }

    fn end_if_done(&mut self) -> Option<Over<E, W>> {
        if !self.due.is_empty() {
            return None;
        }
        let end = self.closing.take()?;
        Some(self.leave(end))
    }

    fn leave(&mut self, end: E) -> Over<E, W> {
        self.is_over = true;
        let unheard = self.due.drain(..).map(|due| due.whose).collect();
        Over { end, unheard }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Move {
        Enter,
        Answer(usize),
        Fail(usize),
        Close,
        Abandon,
    }

    fn moves() -> impl Strategy<Value = Vec<Move>> {
        let one = prop_oneof![
            4 => Just(Move::Enter),
            6 => (0..12_usize).prop_map(Move::Answer),
            1 => (0..12_usize).prop_map(Move::Fail),
            1 => Just(Move::Close),
            1 => Just(Move::Abandon),
        ];
        vec(one, 0..60)
    }

    /// What a stream must have done by now, by lists that only grow.
    #[derive(Default)]
    struct Model {
        entered: u64,
        /// By number: whether the answer was the end of the stream.
        answers: std::collections::BTreeMap<u64, bool>,
        closed: bool,
        abandoned: bool,
    }

    impl Model {
        /// The numbers that were sent, and the end.
        fn expected(&self) -> (Vec<u64>, Option<&'static str>) {
            let mut sent = Vec::new();
            for number in 0..self.entered {
                match self.answers.get(&number) {
                    None => return (sent, None),
                    Some(true) => return (sent, Some("failed")),
                    Some(false) => sent.push(number),
                }
            }
            (sent, self.closed.then_some("closed"))
        }

        fn is_over(&self) -> bool {
            self.abandoned || self.expected().1.is_some()
        }
    }

    proptest! {
        #[test]
        fn any_course_of_a_stream_is_in_order_and_ends_once(moves in moves()) {
            let mut turns = Turns::<u64, &str, u64>::default();
            let mut model = Model::default();
            let mut sent = Vec::new();
            let mut ends = Vec::new();
            for step in moves {
                let was_over = model.is_over();
                let over = match step {
                    Move::Enter => {
                        let taken = turns.enter(model.entered);
                        prop_assert_eq!(taken, (!was_over && !model.closed).then_some(model.entered));
                        model.entered += u64::from(taken.is_some());
                        None
                    }
                    Move::Answer(which) | Move::Fail(which) if model.entered > 0 => {
                        let number = which as u64 % model.entered;
                        let fails = matches!(step, Move::Fail(_));
                        if !was_over {
                            model.answers.entry(number).or_insert(fails);
                        }
                        let answer = if fails { Answer::End("failed") } else { Answer::Message(number) };
                        turns.settle(number, answer, |number| sent.push(number))
                    }
                    Move::Answer(_) | Move::Fail(_) => None,
                    Move::Close => {
                        model.closed |= !was_over;
                        turns.close("closed")
                    }
                    Move::Abandon => {
                        let unheard = turns.abandon();
                        if !was_over {
                            model.abandoned = true;
                            prop_assert_eq!(unheard, (sent.len() as u64..model.entered).collect::<Vec<_>>());
                        }
                        None
                    }
                };
                if let Some(over) = over {
                    // Who was answered and not sent is among them; they are told nothing, as they wait for nothing.
                    let first = sent.len() as u64 + u64::from(over.end == "failed");
                    prop_assert_eq!(over.unheard, (first..model.entered).collect::<Vec<_>>());
                    ends.push(over.end);
                }
                let (expected, end) = model.expected();
                prop_assert_eq!(&sent, &expected);
                prop_assert_eq!(&ends, &(if model.abandoned { None } else { end }).into_iter().collect::<Vec<_>>());
            }
        }
    }
}
