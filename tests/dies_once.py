"""What test_distributed.py starts: dies_once.py FOLDER MOMENTS sft.py ... runs a script, and the first time that
process 1 comes to one of the moments ('step,validation,state') it is killed there."""
import os
import runpy
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import eval as evaluation  # noqa: E402
import model  # noqa: E402
from config import RANK, run  # noqa: E402

WHERE = {'step': (model, 'finish_gradients'), 'validation': (evaluation, 'greedy_accuracy'), 'state': (run, 'checksums')}

def dies_once(f, moment, path):
    def in_place_of_f(*args, **kwargs):
        if not os.path.exists(path):
            if RANK == 1:
                while moment == 'validation' and not os.path.exists(path + '.main'):
                    time.sleep(0.01)
                open(path, 'x').close()
                os.kill(os.getpid(), signal.SIGKILL)
            elif moment == 'validation':  # draws its own samples and hears of nothing, until torchrun asks it to stop
                open(path + '.main', 'x').close()
                while not run.stop_asked():
                    time.sleep(0.01)
        return f(*args, **kwargs)
    return in_place_of_f


folder, moments, *sys.argv = sys.argv[1:]
for moment in filter(None, moments.split(',')):
    module, name = WHERE[moment]
    setattr(module, name, dies_once(getattr(module, name), moment, os.path.join(folder, moment)))
runpy.run_path(sys.argv[0], run_name='__main__')
