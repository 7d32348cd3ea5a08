"""What test_distributed.py starts: run_all.py '[["sft.py", "--lr=1"], ...]' runs one command after another in one process, whose start takes
longer than most of what tests run."""
import json
import os
import runpy
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name='__main__')
