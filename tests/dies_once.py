"""Runs a script, and the first time that process 1 comes to one of the moments it is killed there:
dies_once.py FOLDER step,validation,state sft.py ... See test_distributed.py."""
import os
import runpy
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import eval as evaluation  # noqa: E402
import model  # noqa: E402
from config import RANK, run  # noqa: E402

WHERE = {'step': (model, 'finish_gradients'), 'validation': (evaluation, 'greedy_accuracy'),
         'state': (run, 'checksums')}

def dies_once(f, died, waits):
    """waits: in validation process 0 draws its own samples and hears of nothing until torchrun stops it."""
    def in_place_of_f(*args, **kwargs):
        if RANK == 1 and not os.path.exists(died):
            while waits and not os.path.exists(died + '.waits'):
                time.sleep(0.01)
            open(died, 'x').close()
            os.kill(os.getpid(), signal.SIGKILL)
        if waits and not os.path.exists(died):
            open(died + '.waits', 'x').close()
            while not run.stop_asked():
                time.sleep(0.01)
        return f(*args, **kwargs)
    return in_place_of_f


folder, moments, *sys.argv = sys.argv[1:]
for moment in moments.split(','):
    module, name = WHERE[moment]
    died = os.path.join(folder, moment)
    setattr(module, name, dies_once(getattr(module, name), died, moment == 'validation'))
runpy.run_path(sys.argv[0], run_name='__main__')
