import os, time
import pytest
from test_random_history import live, ResticHistory, told, _little_room
@pytest.mark.timeout(900)
def test_long(capsys):
    end=time.monotonic()+float(os.environ.get("SECS","240")); seed=int(os.environ.get("SEED","100"))
    try:
        while time.monotonic()<end:
            live(seed,histories=1,steps=40,kind=ResticHistory); seed+=1
    finally:
        with capsys.disabled(): print(told(), "last seed", seed)
