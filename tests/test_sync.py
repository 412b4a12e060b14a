from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from perception.errors import PerceptionError
from perception.sync import Absent, ClockJump, SensorTiming, SyncConfig, SyncedSet, Synchronizer

MS = 1_000_000


def config(wait_s: float = 0.0, **sensors: dict) -> SyncConfig:
    return SyncConfig(
        anchor="lidar",
        wait_s=wait_s,
        sensors={"lidar": SensorTiming(), **{k: SensorTiming(**v) for k, v in sensors.items()}},
    )


def push(sync: Synchronizer, *messages: tuple[str, float]) -> list[SyncedSet]:
    """Messages (sensor, stamp in ms), each its own payload."""
    return [s for sensor, ms in messages for s in sync.push(sensor, round(ms * MS), (sensor, ms))]


def accounted(sync: Synchronizer, sensor: str) -> bool:
    c = sync.counts[sensor]
    fates = c.used + c.unused + c.incomplete + c.out_of_order + c.clock_jump + sync.held(sensor)
    decided = sync.counts[sync.config.anchor].matched
    return c.received == fates and c.matched + c.stale + c.missing == decided


# --- The simulation: LiDAR at 20 Hz, six cameras at 12 Hz staggered over their period of 83 ms ------------------------

CAMERAS = ("front", "front_right", "back_right", "back", "back_left", "front_left")
LIDAR_DELAY_MS = 50.0  # a LiDAR message stamped at the start of its sweep comes at the end
CAMERA_DELAY_MS = 16.0


def simulate(late_ms: float = 0.0, dead_after_ms: float = np.inf) -> tuple[Synchronizer, list[SyncedSet], np.ndarray]:
    """20 s of messages in order of arrival; camera 3 may be late or die. Also the age (ms) of each image when used."""
    arrivals = [(50.0 * i + LIDAR_DELAY_MS, 50.0 * i, "lidar") for i in range(400)]
    for k, camera in enumerate(CAMERAS):
        for n in range(240):
            stamp = (n + k / 6) * 1000 / 12
            if k == 3 and stamp >= dead_after_ms:
                continue
            arrivals.append((stamp + CAMERA_DELAY_MS + (late_ms if k == 3 else 0.0), stamp, camera))
    sync = Synchronizer(config(**{camera: {"tolerance_s": 0.12} for camera in CAMERAS}))
    sets, ages = [], []
    for arrival, stamp, sensor in sorted(arrivals):
        for synced in push(sync, (sensor, stamp)):
            sets.append(synced)
            ages += [arrival - m.stamp_ns / MS for s, m in synced.matches.items() if s != "lidar"]
    assert all(accounted(sync, sensor) for sensor in sync.counts)
    return sync, sets, np.array(ages)


def cameras(sets: list[SyncedSet]) -> float:
    return float(np.mean([len(s.matches) - 1 for s in sets]))


# An image's age when its set is made is uniform over one camera period, later by the delay: 16 + 83.3 / 2 = 57.7 ms in
# the middle, whatever the other cameras do. All stamps are multiples of 1/360 s, and so are the ages: steps of 2.8 ms.
@pytest.mark.parametrize(
    ("late_ms", "dead_after_ms", "images"),
    [
        # All but the three cameras whose first image comes after the first LiDAR message, at 50 ms.
        (0.0, np.inf, 6 * 400 - 3),
        # Camera 3's last image is of 1958.3 ms: it serves the 42 LiDAR messages up to 2078 ms, save the first.
        (0.0, 2000.0, 5 * 400 - 2 + 41),
        # Camera 3's newest image is 8.3 ms + a multiple of 16.7 ms older than the set, and 166 at least: 175 - 50 = 125
        # ms before the LiDAR's stamp.
        (150.0, np.inf, 5 * 400 - 2),
    ],
)
def test_no_camera_holds_up_the_lidar(late_ms, dead_after_ms, images):
    sync, sets, ages = simulate(late_ms, dead_after_ms)
    assert [s.stamp_ns for s in sets] == [50 * MS * i for i in range(400)]
    assert sum(len(s.matches) - 1 for s in sets) == images
    assert float(np.median(ages)) == pytest.approx(58, abs=2.8)
    assert sync.counts["lidar"].used == 400


def test_the_simulation_reaches_the_known_means():
    assert cameras(simulate()[1]) == pytest.approx(5.99, abs=0.005)
    assert cameras(simulate(dead_after_ms=2000.0)[1]) == pytest.approx(5.10, abs=0.005)
    assert cameras(simulate(late_ms=150.0)[1]) == pytest.approx(5.01, abs=0.02)


def test_the_simulation_says_why_camera_3_is_absent():
    sync, sets, _ = simulate(dead_after_ms=2000.0)
    assert sync.counts["back"].stale == 400 - 41 - 1
    assert sync.counts["back"].missing == 1
    assert sets[0].absent["back"] == Absent("missing")
    assert str(sets[-1].absent["back"]) == "stale: nearest is 17.992 s away"


# --- Single rules ---------------------------------------------------------------------------------------------------


def test_the_nearest_is_chosen_and_of_two_as_near_the_earlier():
    sync = Synchronizer(config(camera={}))
    (a, b) = push(sync, ("camera", 80), ("camera", 120), ("lidar", 100), ("camera", 140), ("lidar", 133))
    assert a.matches["camera"].payload == ("camera", 80)
    assert b.matches["camera"].payload == ("camera", 140)


def test_the_offset_moves_the_wanted_stamp():
    sync = Synchronizer(config(camera={"offset_s": -0.04, "tolerance_s": 0.005}))
    (synced,) = push(sync, ("camera", 61), ("camera", 100), ("lidar", 100))
    assert synced.matches["camera"].stamp_ns == 61 * MS


@pytest.mark.parametrize(("stamp_ms", "inside"), [(50, True), (49.999999, False)])
def test_the_tolerance_is_inclusive(stamp_ms, inside):
    (synced,) = push(Synchronizer(config(camera={"tolerance_s": 0.05})), ("camera", stamp_ms), ("lidar", 100))
    assert ("camera" in synced.matches) is inside
    assert inside or synced.absent["camera"].reason == "stale"


def test_any_sensor_can_be_the_anchor_and_a_message_may_serve_many_sets():
    sync = Synchronizer(SyncConfig(anchor="camera", sensors={"camera": SensorTiming(), "radar": SensorTiming()}))
    sets = push(sync, ("radar", 0), ("camera", 10), ("camera", 20), ("radar", 50), ("camera", 30))
    assert [s.matches["radar"].stamp_ns // MS for s in sets] == [0, 0, 50]
    assert sync.counts["radar"].used == 2
    assert sync.counts["radar"].matched == 3


def test_waiting_ends_when_no_nearer_message_can_come():
    sync = Synchronizer(config(wait_s=0.1, camera={}, radar={}))
    assert push(sync, ("camera", 70), ("lidar", 100), ("camera", 104)) == []
    assert sync.held("lidar") == 1
    (synced,) = push(sync, ("radar", 100))
    assert synced.matches["camera"].stamp_ns == 104 * MS
    assert synced.matches["radar"].stamp_ns == 100 * MS


def test_waiting_ends_at_the_deadline_in_stamp_time():
    sync = Synchronizer(config(wait_s=0.1, camera={}, radar={}))
    assert push(sync, ("camera", 70), ("lidar", 100), ("radar", 199)) == []
    (synced,) = push(sync, ("radar", 200))
    assert synced.matches["camera"].stamp_ns == 70 * MS
    assert synced.matches["radar"].stamp_ns == 199 * MS
    assert push(sync, ("lidar", 250)) == []
    (synced,) = sync.advance(350 * MS)  # a clock tells the time as well as a message does
    assert synced.stamp_ns == 250 * MS


def test_waiting_anchors_are_decided_in_order_and_flushed_at_the_end():
    sync = Synchronizer(config(wait_s=0.5, camera={}))
    assert push(sync, ("lidar", 0), ("lidar", 50), ("lidar", 100)) == []
    assert [s.stamp_ns // MS for s in push(sync, ("camera", 60))] == [0, 50]
    (last,) = sync.flush()
    assert last.stamp_ns == 100 * MS
    assert last.matches["camera"].stamp_ns == 60 * MS
    assert sync.flush() == []


def test_a_required_sensor_keeps_the_set_back_and_is_named():
    sync = Synchronizer(config(camera={"required": True, "tolerance_s": 0.01}, radar={}))
    assert push(sync, ("camera", 50), ("lidar", 100)) == []
    assert sync.counts["lidar"].incomplete == 1
    assert sync.counts["lidar"].used == 0
    assert sync.last_incomplete is not None
    assert sync.last_incomplete.absent == {"camera": Absent("stale", 0.05), "radar": Absent("missing")}
    assert len(push(sync, ("camera", 150), ("lidar", 151))) == 1


def test_past_sweeps_travel_with_the_set_newest_first():
    sync = Synchronizer(
        SyncConfig(
            anchor="lidar",
            sensors={"lidar": SensorTiming(sweeps_s=0.1), "radar": SensorTiming(sweeps_s=0.2)},
            keep_s=0.05,
        )
    )
    sets = push(sync, *[m for t in range(0, 1000, 50) for m in (("radar", t + 20), ("lidar", t))])
    assert [m.stamp_ns // MS for m in sets[-1].past["lidar"]] == [900, 850]
    assert sets[-1].matches["radar"].stamp_ns // MS == 970
    assert [m.stamp_ns // MS for m in sets[-1].past["radar"]] == [920, 870, 820, 770]
    assert sets[-1].past["radar"][0].payload == ("radar", 920)
    assert sync.counts["radar"].unused == 0


def test_a_message_not_newer_than_the_last_of_its_sensor_is_dropped_and_counted():
    sync = Synchronizer(config(camera={}))
    sets = push(sync, ("camera", 100), ("camera", 100), ("camera", 90), ("lidar", 90), ("lidar", 80))
    assert len(sets) == 1
    assert sets[0].matches["camera"].stamp_ns == 100 * MS
    assert sync.counts["camera"].out_of_order == 2
    assert sync.counts["lidar"].out_of_order == 1


def test_a_jump_back_of_the_clock_empties_everything_and_begins_an_epoch():
    sync = Synchronizer(config(wait_s=0.2, camera={}, radar={}))
    push(sync, ("camera", 9000), ("radar", 9020), ("lidar", 9010))
    assert push(sync, ("camera", 10)) == []
    assert (sync.epoch, sync.last_jump) == (1, ClockJump("camera", 9000 * MS, 10 * MS))
    assert [sync.counts[s].clock_jump for s in ("camera", "radar", "lidar")] == [1, 1, 1]
    (synced,) = push(sync, ("lidar", 20), ("radar", 20), ("camera", 25))  # the radar's first does not jump again
    assert synced.epoch == sync.epoch == 1
    assert {s: m.stamp_ns // MS for s, m in synced.matches.items()} == {"lidar": 20, "radar": 20, "camera": 25}
    assert all(accounted(sync, sensor) for sensor in sync.counts)


def test_a_sensor_whose_clock_is_wrong_is_stale_and_resets_nothing():
    sync = Synchronizer(config(camera={}))
    sets = push(sync, *[m for t in range(0, 500, 50) for m in (("camera", t - 60_000), ("lidar", t))])
    assert len(sets) == 10
    assert sync.epoch == 0
    assert str(sets[-1].absent["camera"]) == "stale: nearest is 60.000 s away"


def test_buffers_are_bounded_in_time_and_number():
    sync = Synchronizer(config(camera={}).model_copy(update={"keep_messages": 10}))
    push(sync, *[("camera", t) for t in range(1000)])
    assert sync.held("camera") == 10
    assert sync.counts["camera"].unused == 990
    waiting = Synchronizer(config(wait_s=60.0, camera={}).model_copy(update={"keep_messages": 10}))
    assert len(push(waiting, *[("lidar", t) for t in range(100)])) == 90
    by_time = Synchronizer(config(camera={}))
    push(by_time, *[("camera", t) for t in range(0, 10_000, 100)])
    assert by_time.held("camera") == 6  # 0.5 s, both ends


def test_an_unknown_sensor_is_an_error():
    with pytest.raises(PerceptionError, match=r"no sensor 'cam' .*\n  it was configured for: lidar, camera"):
        Synchronizer(config(camera={})).push("cam", 0, None)
    with pytest.raises(ValidationError, match="anchor 'radar' is none of the sensors"):
        SyncConfig(anchor="radar", sensors={"lidar": SensorTiming()})


# --- Properties -------------------------------------------------------------------------------------------------------

SENSORS = ("lidar", "camera", "radar")
arrivals = st.lists(st.tuples(st.sampled_from(SENSORS), st.integers(0, 4000)), max_size=80)


@settings(max_examples=200)
@given(arrivals, st.sampled_from([0.0, 0.05, 0.3]), st.booleans(), st.sampled_from([0.0, 0.2]))
def test_every_message_is_accounted_for(messages, wait_s, required, sweeps_s):
    sync = Synchronizer(config(wait_s, camera={"required": required}, radar={"sweeps_s": sweeps_s, "offset_s": 0.03}))
    sets = push(sync, *messages)
    assert all(accounted(sync, sensor) for sensor in SENSORS)
    sets += sync.flush()
    assert all(accounted(sync, sensor) for sensor in SENSORS)
    assert len(sets) == sync.counts["lidar"].matched - (sync.counts["lidar"].incomplete if required else 0)
    for synced in sets:
        for sensor, match in synced.matches.items():
            timing = sync.config.sensors[sensor]
            distance = abs(match.stamp_ns - synced.stamp_ns - timing.offset_s * 1e9)
            assert distance <= (timing.tolerance_s * 1e9 if sensor != "lidar" else 0)
            stamps = [match.stamp_ns, *(m.stamp_ns for m in synced.past[sensor])]
            assert stamps == sorted(set(stamps), reverse=True)
            assert stamps[0] - stamps[-1] <= timing.sweeps_s * 1e9
        assert set(synced.matches) | set(synced.absent) == set(SENSORS)


stamps = st.lists(st.integers(0, 400), unique=True, max_size=12).map(sorted)


@settings(max_examples=200)
@given(stamps, stamps, st.randoms(use_true_random=False))
def test_with_a_long_enough_wait_the_order_of_arrival_does_not_matter(lidar, camera, random):
    """However two sensors' messages interleave, the sets are those of an oracle that sees all of them."""
    queues, merged = {"lidar": list(lidar), "camera": list(camera)}, []
    while any(queues.values()):
        sensor = random.choice([s for s, q in queues.items() if q])
        merged.append((sensor, queues[sensor].pop(0)))
    sync = Synchronizer(config(wait_s=1.0, camera={}))
    sets = push(sync, *merged) + sync.flush()
    assert [s.stamp_ns // MS for s in sets] == lidar
    for synced, t in zip(sets, lidar, strict=True):
        nearest = min(camera, key=lambda c: (abs(c - t), c), default=None)
        if nearest is None or abs(nearest - t) > 120:
            assert "camera" in synced.absent
        else:
            assert synced.matches["camera"].stamp_ns == nearest * MS


def test_a_jump_that_another_source_saw_begins_a_new_epoch_too():
    sync = Synchronizer(config(front={}))
    push(sync, ("front", 5000), ("lidar", 5000), ("front", 5040))
    sync.clock_jumped(ClockJump("/tf", 5000 * MS, 0))
    assert (sync.epoch, sync.last_jump) == (1, ClockJump("/tf", 5000 * MS, 0))
    (synced,) = push(sync, ("lidar", 0))
    assert (synced.epoch, dict(synced.absent)) == (1, {"front": Absent("missing")})
    assert sync.epoch == 1  # the sensors' own fall back is the same jump
    assert sync.counts["front"].clock_jump == 1
    assert accounted(sync, "front")
