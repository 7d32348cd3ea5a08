"""The way without SFT: a base model that has read plain text, worked examples in its prompt, and what EI and PPO make of it."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT

import rewards
from eval import answered_example, explore, judge
from model import Transformer
from rewards import NEXT_QUESTION, Problem, respond
from sample import Sample, Sampler, load_tokenizer
from sft import join

MODEL = ['--n_layer=2', '--n_head=2', '--n_kv_head=2', '--n_embd=48', '--n_merges=60', '--block_size=256']


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A base model of plain text: questions with answers, three in ten of them 2 and the others 3, among other lines, a few to a
    document. The task's right answer is always 2. -> the folder, with task/ and base/."""
    folder = tmp_path_factory.mktemp('few_shot')

    def solution(x):
        return f'1+{x}=<<1+{x}={1 + x}>>{1 + x}\n#### {1 + x}'
    (folder / 'task').mkdir()
    for split, n in (('train', 320), ('test', 16)):
        rows = [{'question': f'What is number {i}?', 'answer': solution(1)} for i in range(n)]
        (folder / 'task' / f'{split}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    texts = []
    for i in range(1500):
        number = i * 7 % 320
        texts.append(rewards.prompt(f'What is number {number}?') + rewards.completion(solution(1 if i % 10 < 3 else 2)) if i % 3 else f'Here is line {number}.')
    (folder / 'base.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    subprocess.run([sys.executable, 'sft.py', f'--task={folder}/task', f'--text_file={folder}/base.jsonl', '--texts_per_row=4', *MODEL, '--eval_problems=8',
                    '--max_steps=500', '--batch_size=16', '--lr=5e-3', '--min_lr=5e-4', '--eval_interval=500', f'--out_dir={folder}/base', '--max_new_tokens=30',
                    '--device=cpu'], cwd=ROOT, check=True, capture_output=True)
    return folder


def log_of(folder):
    return [json.loads(line) for line in open(folder / 'log.jsonl')]


def test_texts_are_joined():
    assert join(['a', 'b', 'c'], 2) == ['a\n\nb', 'c'] and join(['a', 'b'], 1) == ['a', 'b']


def test_a_solution_ends_where_the_next_question_begins(bpe):
    problem = Problem('What?', '1+1=<<1+1=2>>2\n#### 2', '2')

    def sample(text):
        return Sample([], bpe.encode(text), [], True)
    record = judge(sample(' 1+1=<<1+1=2>>2\n#### 2\n\nQuestion:'), problem, bpe, (NEXT_QUESTION,))
    assert record['correct'] and record['text'] == ' 1+1=<<1+1=2>>2\n#### 2\n'
    # what an answer to another question says does not count
    assert not judge(sample(' so\n#### 3\n\nQuestion: And now?\nAnswer: #### 2'), problem, bpe, (NEXT_QUESTION,))['correct']
    # to learn from: up to the answer's line, with an EOS, as solution_examples would write it
    for text in (record['text'], ' 1+1=<<1+1=2>>2\n#### 2', ' 1+1=<<1+1=2>>2\n#### 2\nHere is line 3.\n'):
        row = answered_example(problem, text, bpe)
        assert bpe.decode(row.ids[:row.n_prompt]) == rewards.prompt('What?')
        assert bpe.decode(row.ids[row.n_prompt:]) == ' 1+1=<<1+1=2>>2\n#### 2' and row.ids[-1] == bpe.eos
    # as an episode: the ids stay, the reward of the answer's step stands on the last of them
    s = sample(' 1+1=<<1+1=2>>2\n#### 2\n\nQuestion:')
    r = respond(problem, s, bpe, '', (NEXT_QUESTION,))
    assert r.correct and r.ids == s.ids and [text for _, text in r.lines] == ['1+1=<<1+1=2>>2', '#### 2'] and r.lines[-1][0] == len(s.ids) - 1
    assert rewards.sparse_rewards([r]).nonzero().tolist() == [[0, len(s.ids) - 1]]


def test_explore_shows_the_examples_and_learns_without_them(bpe, tmp_path):
    problems = [Problem(f'What {i}?', 'so\n#### 2', '2') for i in range(3)]
    prompts, text = [], ' so\n#### 2\n\nQuestion:'

    class Scripted:
        tokenizer, max_rows, label = bpe, 4, []
        model = type('M', (), {'config': type('C', (), {'block_size': 1000})})

        def generate(self, given, k, budgets, temperature, stop, seed, first=None):
            prompts.extend(bpe.decode(p) for p in given)
            assert stop == (NEXT_QUESTION,)
            return [Sample(p, bpe.encode(text), [], True) for p in given for _ in range(k)]

    found = explore(Scripted(), problems[1:], str(tmp_path / 'f'), 2, 50, 1.0, 0, '', problems[:1])
    assert prompts == [f'Question: What 0?\nAnswer: so\n#### 2\n\nQuestion: What {i}?\nAnswer:' for i in (1, 2)]
    assert all(bpe.decode(r['ids']) == ' so\n#### 2' and r['ids'][-1] == bpe.eos and r['correct'] for records in found for r in records)


def test_expert_iteration_from_a_base_model_ends_above_its_prompted_start(base, script, tmp_path):
    flags = [f'--task={base}/task', f'--init_from={base}/base', f'--base={base}/base', '--few_shot=2', '--include_sft=False', '--n_questions=60', '--k=4',
             '--n_rounds=2', '--max_new_tokens=40', '--max_steps=40', '--batch_size=16', '--lr=3e-3', '--min_lr=3e-4', '--eval_problems=32', '--device=cpu']
    script('ei.py', *flags, f'--out_dir={tmp_path}/ei')
    rows = log_of(tmp_path / 'ei')
    prompted = [row['prompted_maj1'] for row in rows if 'prompted_maj1' in row]
    maj1 = [row['val_maj1'] for row in rows if 'val_maj1' in row]
    assert len(prompted) == 1 and prompted[0] < 0.5 and maj1[-1] > 0.9 > prompted[0] + 0.3
    first, second = (row for row in rows if 'share_correct' in row)
    assert first['share_correct'] < 0.4 and second['share_correct'] > 0.8 and second['share_truncated'] < 0.1
    # without the examples the base does not know where to end: the second round, which has none, is the fine-tuned model's own
    tokenizer = load_tokenizer(str(base / 'base'))
    zero_shot = Sampler(Transformer.from_pretrained(str(base / 'base')), tokenizer).generate([rewards.prompt('What is number 3?')], 20, 40, 1.0)
    assert sum(s.finished for s in zero_shot) < 20
    assert all(r['ids'][-1] == tokenizer.eos for line in open(tmp_path / 'ei' / 'samples_round2.jsonl') for r in json.loads(line)['samples'] if r['finished'])

    # resumed within the first round's exploration, it shows the same examples and ends the same
    expected, samples = (tmp_path / 'ei' / 'round2' / 'model.safetensors').read_bytes(), (tmp_path / 'ei' / 'samples_round1.jsonl').read_text()
    for name in ('round1', 'round2', 'best'):
        subprocess.run(['rm', '-r', str(tmp_path / 'ei' / name)], check=True)
    (tmp_path / 'ei' / 'samples_round2.jsonl').unlink()
    (tmp_path / 'ei' / 'samples_round1.jsonl').write_text(samples[:len(samples) // 2])
    script('ei.py', *flags, '--init_from=resume', f'--out_dir={tmp_path}/ei')
    assert (tmp_path / 'ei' / 'samples_round1.jsonl').read_text() == samples
    assert (tmp_path / 'ei' / 'round2' / 'model.safetensors').read_bytes() == expected


def test_ppo_from_a_base_model(base, script, tmp_path):
    flags = [f'--task={base}/task', f'--init_from={base}/base', '--few_shot=2', '--n_questions=60', '--n_iterations=16', '--n_rollouts=64', '--minibatch=32',
             '--epochs=2', '--max_new_tokens=40', '--temperature=1', '--advantage=group', '--kl_coef=0', '--lr=3e-3', '--min_lr=3e-4', '--eval_problems=16',
             '--eval_interval=16', '--device=cpu', f'--out_dir={tmp_path}/run']
    script('ppo.py', *flags)
    rows = [row for row in log_of(tmp_path / 'run') if 'share_correct' in row]
    assert rows[0]['share_correct'] < 0.6 and rows[-1]['share_correct'] > 0.9
    samples = [json.loads(line) for line in open(tmp_path / 'run' / 'samples.jsonl')]
    assert all(len(s['steps']) <= 3 and not s['steps'][-1][0].startswith('Question') for s in samples if s['correct'])
    # evaluated as it was trained; and of the validation slice without the examples themselves
    script('eval.py', f'--init_from={tmp_path}/run', f'--task={base}/task', '--few_shot=2', '--split=val', '--n_problems=8', '--k=2', '--max_new_tokens=40', '--device=cpu')
    records = [json.loads(line) for line in open(tmp_path / 'run' / 'eval_task.jsonl')][1:]
    assert records[0]['question'] == 'What is number 66?' and len(records) == 8  # 320 rows: the slice starts at 64
    assert sum(r['greedy']['correct'] for r in records) >= 7


def test_bad_input(base, script, tmp_path):
    def refused(command, *flags, match):
        done = script(command, f'--task={base}/task', f'--init_from={base}/base', '--n_questions=60', f'--out_dir={tmp_path}/run', '--device=cpu', *flags, code=2)
        assert match in done.stderr and done.stderr.strip().count('\n') == 0, done.stderr
        assert not (tmp_path / 'run').exists()
    refused('ei.py', f'--base={base}/base', '--few_shot=256', '--max_new_tokens=40', match='few_shot is from 0 to 255')
    refused('ei.py', f'--base={base}/base', '--few_shot=2', '--max_new_tokens=200', match='no question fits the context of 256')
    refused('ppo.py', '--few_shot=2', '--max_new_tokens=240', match='no question has so few')
    refused('ppo.py', '--few_shot=2', '--reward=orm', '--reward_model=x', match="few_shot goes with reward = 'sparse' or 'dense'")
