"""Students, and the groups that take them: every way a group can come back, or not."""

import asyncio

import pytest

from softlabel.search.dispatcher import Dispatcher

WAIT = 0.01


def run(story):
    asyncio.run(asyncio.wait_for(story, 10))


def history(epochs):
    return [{"epoch": i + 1, "map50": 0.1 * i, "seconds": 1.0} for i in range(epochs)]


async def stopped_in_hand():
    """A dispatcher whose first group has heard that its student is not wanted any more, and has not put it down yet."""
    dispatcher = Dispatcher(1)
    await dispatcher.submit("a", "job a")
    await dispatcher.next_job(0, "node", WAIT)
    await dispatcher.stop("a")
    assert not await dispatcher.report(0, history(1), 1.0)
    return dispatcher


def test_a_student_goes_through_a_group():
    async def story():
        dispatcher = Dispatcher(1)
        taking = asyncio.create_task(dispatcher.next_job(0, "node", 5))
        await dispatcher.submit("a", "job a")
        assert await taking == "job a"
        waiting = asyncio.create_task(dispatcher.wait("a", 0))
        assert await dispatcher.report(0, history(1), 2.0)
        assert (await waiting)["history"] == history(1)
        ending = asyncio.create_task(dispatcher.wait("a", 1))
        await dispatcher.release(0, "finished", "", history(2), 3.0)
        assert await ending == {"status": "finished", "reason": "", "history": history(2), "seconds": 3.0}
        assert await dispatcher.next_job(0, "node", WAIT) == "wait"
        await dispatcher.close()
        assert await dispatcher.next_job(0, "node", 5) == "close"

    run(story())


def test_a_stopped_student_is_put_down_and_may_go_on_later():
    async def story():
        dispatcher = await stopped_in_hand()
        await dispatcher.release(0, "stopped", "", [], 0.0)
        assert dispatcher.status("a")["history"] == history(1)
        await dispatcher.submit("a", "job a")
        assert await dispatcher.next_job(1, "node", WAIT) == "job a"
        assert await dispatcher.report(1, history(2), 2.0)

    run(story())


def test_a_group_waits_where_its_student_does_until_somebody_decides():
    async def story():
        dispatcher = Dispatcher(1)
        await dispatcher.submit("a", "job a", 2)
        await dispatcher.next_job(0, "node", WAIT)
        assert await dispatcher.report(0, history(1), 1.0)
        asking = asyncio.create_task(dispatcher.report(0, history(2), 2.0))
        assert (await dispatcher.wait("a", 1))["history"] == history(2)
        assert not asking.done()
        await dispatcher.extend("a", 3)
        assert await asking
        asking = asyncio.create_task(dispatcher.report(0, history(3), 3.0))
        await dispatcher.wait("a", 2)
        assert not asking.done()
        await dispatcher.stop("a")
        assert not await asking
        await dispatcher.release(0, "stopped", "", [], 0.0)
        await dispatcher.submit("a", "job a")  # now to its end
        assert await dispatcher.next_job(0, "node", WAIT) == "job a"
        assert await dispatcher.report(0, history(4), 4.0)

    run(story())


def test_a_group_that_waits_goes_home_when_the_dispatcher_closes():
    async def story():
        dispatcher = Dispatcher(1)
        await dispatcher.submit("a", "job a", 1)
        await dispatcher.next_job(0, "node", WAIT)
        asking = asyncio.create_task(dispatcher.report(0, history(1), 1.0))
        await dispatcher.wait("a", 0)
        await dispatcher.close()
        assert not await asking

    run(story())


def test_a_student_taken_up_again_while_its_group_has_it_stays_there():
    async def story():
        dispatcher = Dispatcher(1)
        await dispatcher.submit("a", "job a")
        await dispatcher.next_job(0, "node", WAIT)
        await dispatcher.stop("a")
        await dispatcher.submit("a", "job a")
        assert await dispatcher.next_job(1, "node", WAIT) == "wait"
        assert await dispatcher.report(0, history(1), 1.0)

    run(story())


def test_a_student_asked_for_again_while_it_is_put_down_goes_on():
    async def story():
        dispatcher = await stopped_in_hand()
        await dispatcher.submit("a", "job a")
        await dispatcher.release(0, "stopped", "", [], 0.0)
        assert dispatcher.status("a")["status"] == "waiting"  # else who waits for it takes it for ended
        assert await dispatcher.next_job(1, "node", WAIT) == "job a"

    run(story())


def test_the_question_of_a_worker_that_died_takes_no_student():
    async def story():
        dispatcher = Dispatcher(1)
        of_the_dead = asyncio.create_task(dispatcher.next_job(0, "node", 5))
        await asyncio.sleep(0)
        asking = asyncio.create_task(dispatcher.next_job(0, "node", 5))
        await asyncio.sleep(0)
        await dispatcher.submit("a", "job a")
        assert await asking == "job a" and await of_the_dead == "wait"
        waiting = asyncio.create_task(dispatcher.next_job(1, "lost", 5))
        await asyncio.sleep(0)
        await dispatcher.nodes_lost(["lost"])
        await dispatcher.submit("b", "job b")
        assert await waiting == "wait" and await dispatcher.next_job(2, "node", WAIT) == "job b"

    run(story())


def test_a_student_that_was_never_handed_in_is_nothing_yet():
    assert Dispatcher(1).status("a") == {"status": "waiting", "reason": "", "history": [], "seconds": 0.0}


def test_a_student_that_nobody_took_can_be_stopped():
    async def story():
        dispatcher = Dispatcher(1)
        await dispatcher.submit("a", "job a")
        await dispatcher.stop("a")
        assert await dispatcher.next_job(0, "node", WAIT) == "wait"
        assert (await dispatcher.wait("a", 0))["status"] == "stopped"

    run(story())


@pytest.mark.parametrize("failures", [1, 3])
def test_a_group_whose_workers_died_gets_its_student_again_so_often(failures):
    async def story():
        dispatcher = Dispatcher(failures)
        await dispatcher.submit("a", "job a")
        for _ in range(1 + failures):
            assert await dispatcher.next_job(0, "node", WAIT) == "job a"
        await dispatcher.note_failure(0, "RuntimeError: connection closed by peer")
        waiting = asyncio.create_task(dispatcher.wait("a", 0))
        assert await dispatcher.next_job(0, "node", WAIT) == "wait"
        assert (await waiting)["reason"] == (
            f"its workers died {failures + 1} times: RuntimeError: connection closed by peer"
        )

    run(story())


def test_what_was_on_a_lost_node_goes_to_whoever_is_free():
    async def story():
        dispatcher = Dispatcher(2)
        for name in "ab":
            await dispatcher.submit(name, f"job {name}")
        assert await dispatcher.next_job(0, "lost", WAIT) == "job a"
        assert await dispatcher.next_job(1, "kept", WAIT) == "job b"
        await dispatcher.nodes_lost(["lost"])
        await dispatcher.release(1, "finished", "", history(1), 1.0)
        assert await dispatcher.next_job(1, "kept", WAIT) == "job a"
        assert await dispatcher.next_job(0, "new", WAIT) == "wait"  # the group that lost it comes back empty-handed
        assert not await dispatcher.report(0, history(1), 1.0)

    run(story())


def test_when_the_dispatcher_closes_students_are_put_down():
    async def story():
        dispatcher = Dispatcher(1)
        await dispatcher.submit("a", "job a")
        await dispatcher.next_job(0, "node", WAIT)
        await dispatcher.close()
        assert not await dispatcher.report(0, history(1), 1.0)

    run(story())
