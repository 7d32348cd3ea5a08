"""The way without SFT: a base model that has read plain text, worked examples in its prompt, and what EI and PPO make of it."""
import json
import random
import shutil

import pytest
from conftest import coin_problem, coin_logprobs, run_script, write_task

import rewards
from eval import answered_example, explore, judge
from rewards import NEXT_QUESTION, Problem, respond
from sample import Example, Sample, load_tokenizer
from sft import join, solution_examples

MODEL = ['--n_layer=1', '--n_head=2', '--n_kv_head=2', '--n_embd=32', '--n_merges=60', '--block_size=256']


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A base model of plain text: questions with answers, three in ten of them 2 and the others 3, among other lines, a few to a
    document. The task's right answer is always 2. -> the folder, with task/ and base/."""
    folder = tmp_path_factory.mktemp('few_shot')
    write_task(folder, {'train': [coin_problem(i) for i in range(320)], 'test': [coin_problem(i) for i in range(16)]})
    rng, texts = random.Random(0), []
    for i in range(1500):
        p = coin_problem(i * 7 % 320, 1 if rng.random() < 0.3 else 2)
        texts.append(rewards.prompt(p.question) + rewards.completion(p.solution) if i % 3 else f'Here is line {i}.')
    (folder / 'base.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    run_script('sft.py', f'--task={folder}/task', f'--text_file={folder}/base.jsonl', '--texts_per_row=4', *MODEL, '--eval_problems=8',
               '--max_steps=250', '--batch_size=8', '--lr=5e-3', '--min_lr=5e-4', f'--out_dir={folder}/base', '--max_new_tokens=30', '--device=cpu')
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


def test_expert_iteration_from_a_base_model_learns_what_is_right_and_where_it_ends(base, script, tmp_path):
    flags = [f'--task={base}/task', f'--init_from={base}/base', f'--base={base}/base', '--few_shot=2', '--include_sft=False', '--n_questions=30', '--k=8',
             '--n_rounds=2', '--max_new_tokens=40', '--max_steps=20', '--batch_size=16', '--lr=3e-3', '--min_lr=3e-4', '--eval_problems=8', '--device=cpu']
    script('ei.py', *flags, f'--out_dir={tmp_path}/ei')
    rows = log_of(tmp_path / 'ei')
    assert sum('prompted_maj1' in row for row in rows) == 1 and sum('val_maj1' in row for row in rows) == 2
    # Asked without examples it now gives the right answer and ends there. Over seeds ln P(right, EOS) rose by 4.3 to 7.8, and ended 6 to
    # 19 above ln P(wrong, EOS); it had learned from right solutions alone.
    def zero_shot(problem, tokenizer):
        return solution_examples([problem], tokenizer)[0]
    (before, _), (right, wrong) = (coin_logprobs(folder, zero_shot) for folder in (base / 'base', tmp_path / 'ei' / 'round1'))
    assert right > before + 2 and right > wrong + 2
    # the second round, which shows no examples, is the fine-tuned model's own
    tokenizer = load_tokenizer(str(base / 'base'))
    assert all(r['ids'][-1] == tokenizer.eos for line in open(tmp_path / 'ei' / 'samples_round2.jsonl') for r in json.loads(line)['samples'] if r['finished'])

    # resumed within the first round's exploration, it shows the same examples and ends the same
    expected, samples = (tmp_path / 'ei' / 'round2' / 'model.safetensors').read_bytes(), (tmp_path / 'ei' / 'samples_round1.jsonl').read_text()
    for name in ('round1', 'round2', 'best'):
        shutil.rmtree(tmp_path / 'ei' / name)
    (tmp_path / 'ei' / 'samples_round2.jsonl').unlink()
    (tmp_path / 'ei' / 'samples_round1.jsonl').write_text(samples[:len(samples) // 2])
    script('ei.py', *flags, '--init_from=resume', f'--out_dir={tmp_path}/ei')
    assert (tmp_path / 'ei' / 'samples_round1.jsonl').read_text() == samples
    assert (tmp_path / 'ei' / 'round2' / 'model.safetensors').read_bytes() == expected


def test_ppo_from_a_base_model(base, script, tmp_path):
    flags = [f'--task={base}/task', f'--init_from={base}/base', '--few_shot=2', '--n_questions=60', '--n_iterations=4', '--n_rollouts=64', '--minibatch=32',
             '--epochs=1', '--max_new_tokens=40', '--temperature=1', '--advantage=group', '--kl_coef=0', '--lr=1e-3', '--eval_problems=16',
             '--device=cpu', f'--out_dir={tmp_path}/run']
    script('ppo.py', *flags)
    shown = rewards.load_problems(f'{base}/task', 'val')[:2]

    def few_shot(problem, tokenizer):
        prompt, ids = tokenizer.encode_pair(rewards.prompt(problem.question, shown), rewards.completion(problem.solution))
        return Example(prompt + ids, len(prompt))
    start, end = (coin_logprobs(folder, few_shot) for folder in (base / 'base', tmp_path / 'run' / 'last'))
    assert (end[0] - end[1]) - (start[0] - start[1]) > 0.5  # over seeds the log-odds of the right solution rose by 1.6 to 9
    # a sample ends where the next question begins, which is no step of it; what it says between its answer and there may be one
    for s in map(json.loads, open(tmp_path / 'run' / 'samples.jsonl')):
        before = s['text'].split(NEXT_QUESTION)[0].split('\n')
        assert not s['correct'] or [line for line, _ in s['steps']] == [line.strip() for line in before if line.strip()]
        assert [r for _, r in s['steps']] == [0.0] * (len(s['steps']) - 1) + [float(s['correct'])]
    # evaluated as it was trained; and of the validation slice without the examples themselves
    script('eval.py', f'--init_from={tmp_path}/run', f'--task={base}/task', '--few_shot=2', '--split=val', '--n_problems=8', '--k=2', '--max_new_tokens=40', '--device=cpu')
    records = [json.loads(line) for line in open(tmp_path / 'run' / 'eval_task.jsonl')][1:]
    assert records[0]['question'] == 'What is number 66?' and len(records) == 8  # 320 rows: the slice starts at 64


def test_bad_input(base, script, tmp_path):
    def refused(command, *flags, match):
        done = script(command, f'--task={base}/task', f'--init_from={base}/base', '--n_questions=60', f'--out_dir={tmp_path}/run', '--device=cpu', *flags, code=2)
        assert match in done.stderr and done.stderr.strip().count('\n') == 0, done.stderr
        assert not (tmp_path / 'run').exists()
    refused('ei.py', f'--base={base}/base', '--few_shot=256', '--max_new_tokens=40', match='few_shot is from 0 to 255')
    refused('ei.py', f'--base={base}/base', '--few_shot=2', '--max_new_tokens=200', match='no question fits the context of 256')
    refused('ppo.py', '--few_shot=2', '--max_new_tokens=240', match='no question has so few')
    refused('ppo.py', '--few_shot=2', '--reward=orm', '--reward_model=x', match="few_shot goes with reward = 'sparse' or 'dense'")
