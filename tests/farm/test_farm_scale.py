"""The simulation of a farm, with answers that are known by hand."""

import math

import pytest

from bench.farm_simulator import Farm, Job, Outcome, Simulation


def run(farm: Farm, *jobs: Job) -> Outcome:
    return Simulation(farm, list(jobs)).run()


def computing(*seconds: float) -> list[Job]:
    return [Job(0, 0, each) for each in seconds]


def test_one_job_is_the_sum_of_its_parts():
    # dispatch 1, start 2, first 100/10, read 100/10, compute 7, write 30/10
    found = run(Farm(1, storage=10, start=2, dispatch=1), Job(100, 30, 7, layers=4, first=100))
    assert found.makespan == pytest.approx(1 + 2 + 10 + 10 + 7 + 3)
    assert found.moved == pytest.approx(230) and found.peak == 10 and found.starts == 1
    assert found.full == pytest.approx(23)


def test_storage_is_shared_equally():
    # 100 B from second 0, 50 B from second 5 on, together 10 B/s: 50 + 50 left at 5, both end at 15
    storage = Simulation(Farm(2, storage=10), []).storage
    storage.add(0, 100)
    storage.advance(5)
    storage.add(1, 50)
    assert storage.rate() == 5 and storage.next_end()[0] == pytest.approx(15)


def test_a_machine_takes_no_more_than_its_link():
    found = run(Farm(2, storage=100, link=10), Job(100, 0, 0), Job(100, 0, 0))
    assert found.makespan == pytest.approx(10)
    assert found.peak == 20 and found.full == 0


def test_transfers_of_one_overlap_with_computing_of_another():
    # A computes for 10 s while B, whose dispatch took 10 s more, reads
    found = run(Farm(2, storage=10, dispatch=10), Job(100, 0, 10), Job(100, 0, 10))
    # A: 10 dispatch, 10 reading, 10 computing: 30. B: 20 dispatch, alone from then on: 10, 10: 40
    assert found.makespan == pytest.approx(40)


def test_longest_first_can_end_sooner():
    assert run(Farm(2), *computing(1, 1, 2)).makespan == 3
    assert run(Farm(2), *computing(2, 1, 1)).makespan == 2


def test_a_death_takes_one_layer_the_start_and_what_is_read_first():
    job = Job(10, 0, 10, layers=10, first=10)
    farm = Farm(1, storage=10, start=2, parts=1, deaths=((7.5, 0),), rejoin=5)
    # start 2, first 1, read 1; dies at 7.5 after 3.5 layers: 3 are kept. Back at 12.5:
    # start 2, first 1, read 7 of 10 bytes 0.7, 7 layers: 23.2
    found = run(farm, job)
    assert found.makespan == pytest.approx(23.2)
    assert (found.starts, found.deaths) == (2, 1)
    assert found.moved == pytest.approx(10 + 10 + 10 + 7)


def test_a_half_done_transfer_counts_by_what_went_through():
    found = run(Farm(1, storage=10, deaths=((4.0, 0),)), Job(100, 0, 0))
    assert found.moved == pytest.approx(40 + 100) and found.makespan == pytest.approx(14)


def test_an_idle_worker_takes_the_job_of_a_dead_one():
    # worker 1 is done at 1 and takes over at 6: 4 of 10 layers are left out of the journal
    jobs = [Job(0, 0, 10, layers=10), Job(0, 0, 1)]
    found = run(Farm(2, parts=1, deaths=((6.0, 0),), rejoin=1000), *jobs)
    assert found.makespan == pytest.approx(10)


def test_a_dead_workers_job_is_the_next_that_anyone_takes():
    # 4 s and 3 s begin; at 2 the first dies, comes back at once and goes on to 4; at 3 the other
    # takes the last. Behind the last, the first would go on from 3 to 5.
    jobs = [Job(0, 0, 4, layers=4), Job(0, 0, 3), Job(0, 0, 1)]
    assert run(Farm(2, parts=1, deaths=((2.0, 0),)), *jobs).makespan == pytest.approx(4)


def test_a_head_that_starts_again_stops_everyone():
    jobs = [Job(0, 0, 10, layers=10), Job(0, 0, 10, layers=10)]
    found = run(Farm(2, parts=1, heads=(5.5,), away=60), *jobs)
    assert found.makespan == pytest.approx(5.5 + 60 + 5)
    assert (found.starts, found.deaths) == (4, 0)


def test_the_driver_sends_jobs_one_after_another():
    assert run(Farm(4, dispatch=1), *computing(10, 10, 10, 10)).makespan == 14


def test_no_byte_is_lost_and_no_bandwidth_exceeded():
    jobs = [Job(10 + i % 7, 3, 0.5 + i % 3, layers=5, first=2) for i in range(200)]
    found = run(Farm(16, storage=40, link=8, start=0.1), *jobs)
    assert found.moved == pytest.approx(sum(job.bytes for job in jobs))
    assert found.peak <= 40 * (1 + 1e-9)
    assert found.makespan >= found.moved / 40


def test_deaths_come_as_often_as_they_should():
    # 2000 hours of work, a death every 10: some 200 deaths, each a restart
    found = run(Farm(20, mtbf=10.0, seed=1, parts=1), *[Job(0, 0, 10, layers=100)] * 200)
    assert found.deaths == pytest.approx(200, rel=0.25)
    assert found.starts == 200 + found.deaths
    assert math.isclose(found.makespan, 100, rel_tol=0.15)
