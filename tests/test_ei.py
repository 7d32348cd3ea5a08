"""Expert Iteration: the filter, de-duplication, accumulation, the reset, and an exploration that was stopped."""
import json

import pytest
import torch
from conftest import loud, tiny_config
from test_sft import TINY, problem, task  # noqa: F401 (task is a fixture)

from config import UserError
from ei import select, solution_key
from eval import explore
from model import Transformer
from sample import Sampler


def record(text, correct=True, **more):
    return {'text': text, 'correct': correct, 'return': float(correct), 'finished': True, 'answer': '3', 'tokens': 3, 'ids': [1, 2, 3]} | more


A, A2, B, C = '<<1+2=3>> so 3', 'it is <<1+2=3>>3', '<<2+1=3>>3', '<<4-1=3>>3'


def test_only_right_solutions_pass():
    assert select([record(A, False), record(B)], set(), 0, 0) == [record(B)]
    assert select([record(A, False)], set(), 0, 0) == []


def test_the_first_of_each_equation_sequence_stays():
    seen = set()
    assert [r['text'] for r in select([record(A), record(A2), record(B), record(A)], seen, 0, 0)] == [A, B]
    assert [r['text'] for r in select([record(A2), record(C)], seen, 2, 0)] == [C]  # a later round brings what is new
    assert select([record(C)], seen, 3, 0) == []


def test_a_wrong_solution_does_not_hide_a_right_one():
    assert select([record(A, False), record(A)], set(), 0, 0) == [record(A)]


def test_the_cap_counts_earlier_rounds():
    assert [r['text'] for r in select([record(A), record(B), record(C)], set(), 0, 2)] == [A, B]
    assert [r['text'] for r in select([record(A), record(B), record(C)], set(), 1, 2)] == [A]
    assert select([record(A)], set(), 2, 2) == []


def test_solutions_without_equations_are_compared_as_text():
    assert solution_key(' no equations #### 3') != solution_key(' none here #### 3')
    assert solution_key(A) == solution_key(A2) != solution_key(B)


def test_exploration_in_pieces_equals_one_in_a_single_go(bpe, tmp_path):
    sampler = Sampler(loud(Transformer(tiny_config(bpe.vocab_size))), bpe, max_rows=2)
    problems = [problem(a, 2) for a in range(1, 30)]
    arguments = dict(k=2, max_new_tokens=8, temperature=1.0, seed=4, desc='')
    whole = explore(sampler, problems, str(tmp_path / 'whole'), **arguments)
    lines = (tmp_path / 'whole').read_text()
    assert len(whole) == 29 and all(len(records) == 2 for records in whole) and lines.count('\n') == 29
    (tmp_path / 'torn').write_text(lines[:len(lines) // 2])  # killed while it wrote a line
    drawn = []
    generate = sampler.generate
    sampler.generate = lambda prompts, *a, **k: drawn.extend(prompts) or generate(prompts, *a, **k)
    assert explore(sampler, problems, str(tmp_path / 'torn'), **arguments) == whole
    assert (tmp_path / 'torn').read_text() == lines
    assert 10 < len(drawn) < 20  # what was there is not drawn again
    with pytest.raises(UserError, match='other questions'):
        explore(sampler, problems[1:], str(tmp_path / 'whole'), **arguments)


# -----------------------------------------------------------------------------
# the script

EI = ['--k=4', '--max_new_tokens=30', '--batch_size=8', '--max_steps=4', '--eval_problems=4', '--n_questions=12', '--n_worked=6', '--lr=1e-3',
      '--device=cpu']


@pytest.fixture(scope='module')
def policies(tmp_path_factory):
    """A base that knows nothing, and a policy that has learned the few questions by heart and answers them right."""
    import subprocess
    import sys

    from conftest import ROOT
    folder = tmp_path_factory.mktemp('policies')
    rows = [problem(1 + a % 4, 1 + a // 4) for a in range(12)] + [problem(1, 1)] * 260
    (folder / 'task').mkdir()
    for name in ('train', 'test'):
        (folder / 'task' / f'{name}.jsonl').write_text(''.join(json.dumps({'question': p.question, 'answer': p.solution}) + '\n' for p in rows))
    common = [f'--task={folder}/task', *TINY, '--n_embd=64']
    for flags in ([f'--out_dir={folder}/base', '--max_steps=1'],
                  [f'--out_dir={folder}/sft', f'--init_from={folder}/base', '--max_steps=120', '--eval_interval=120', '--n_worked=12', '--lr=5e-3']):
        subprocess.run([sys.executable, 'sft.py', *common, *flags], cwd=ROOT, check=True, capture_output=True)
    return folder


def log_of(folder):
    return [json.loads(line) for line in open(folder / 'log.jsonl')]


def test_rounds_accumulate_and_reset_to_the_base(policies, script, tmp_path):
    flags = [f'--task={policies}/task', f'--init_from={policies}/sft', f'--base={policies}/base', *EI, '--n_rounds=2', '--temperature=1.5']
    script('ei.py', *flags, f'--out_dir={tmp_path}/ei')
    rounds = [row for row in log_of(tmp_path / 'ei') if 'dataset' in row]
    assert [row['samples_drawn'] for row in rounds] == [48, 96]
    assert rounds[0]['dataset'] == 6 + rounds[0]['new_solutions'] and rounds[1]['dataset'] == rounds[0]['dataset'] + rounds[1]['new_solutions']
    assert rounds[0]['new_solutions'] > 0 and 0 < rounds[0]['share_correct'] < 1

    def distance(a, b):
        a, b = (Transformer.from_pretrained(str(path)) for path in (a, b))
        return sum((x - y).square().sum() for x, y in zip(a.parameters(), b.parameters())).sqrt().item()

    # four small steps away from where each round started: the base, not the policy that drew the samples
    assert distance(tmp_path / 'ei' / 'round2', policies / 'base') < 0.5 * distance(tmp_path / 'ei' / 'round2', policies / 'sft')
    script('ei.py', *flags, '--reset=previous', '--n_rounds=1', f'--out_dir={tmp_path}/previous')
    assert distance(tmp_path / 'previous' / 'round1', policies / 'sft') < 0.5 * distance(tmp_path / 'previous' / 'round1', policies / 'base')
    script('ei.py', *flags, '--include_sft=False', '--n_rounds=1', f'--out_dir={tmp_path}/without')
    assert [r for r in log_of(tmp_path / 'without') if 'dataset' in r][0]['dataset'] < 48

    # resumed after a kill within the second round's exploration, it ends in the same weights
    expected = (tmp_path / 'ei' / 'round2' / 'model.safetensors').read_bytes()
    samples = (tmp_path / 'ei' / 'samples_round2.jsonl').read_text()
    import shutil
    shutil.rmtree(tmp_path / 'ei' / 'round2')
    (tmp_path / 'ei' / 'samples_round2.jsonl').write_text(samples[:len(samples) // 3])
    script('ei.py', *flags, '--init_from=resume', f'--out_dir={tmp_path}/ei')
    assert (tmp_path / 'ei' / 'samples_round2.jsonl').read_text() == samples
    assert (tmp_path / 'ei' / 'round2' / 'model.safetensors').read_bytes() == expected


def test_bad_input(policies, script, tmp_path):
    def refused(*flags, match):
        done = script('ei.py', f'--task={policies}/task', f'--init_from={policies}/sft', f'--base={policies}/base', *EI, f'--out_dir={tmp_path}/ei',
                      *flags, code=2)
        assert match in done.stderr and done.stderr.strip().count('\n') == 0, done.stderr

    refused('--k=0', match='k, n_rounds and')
    refused('--temperature=0', match='temperature must be above 0')
    refused('--base=', match='needs the checkpoint')
    refused('--reset=never', match="not 'never'")
    refused('--n_questions=1000', match='n_questions')
    refused('--init_from=' + str(tmp_path / 'nothing'), match='nothing')
    assert not (tmp_path / 'ei').exists()
    # a policy that never answers: say why, and name the share that was cut off
    refused(f'--init_from={policies}/base', '--include_sft=False', '--max_new_tokens=3', match='none of 48 samples is right')


def test_policies_with_other_tokenizers_are_refused(policies, script, tmp_path, bpe):
    torch.manual_seed(0)
    Transformer(tiny_config(bpe.vocab_size)).init_weights().save_pretrained(str(tmp_path / 'm'), bpe)
    done = script('ei.py', f'--task={policies}/task', f'--init_from={policies}/sft', f'--base={tmp_path}/m', *EI, f'--out_dir={tmp_path}/ei', code=2)
    assert 'different tokenizers' in done.stderr
