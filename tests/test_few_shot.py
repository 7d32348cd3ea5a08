"""Without SFT: a base model of plain text, worked examples in its prompt, and what EI and PPO make of it."""
import json
import random

import pytest
from conftest import coin_logprobs, coin_problem, run_script, tiny, write_task
from test_rewards import log_of, rows_of

import rewards
from data import NEXT_QUESTION, Problem, completion, load_problems, prompt
from eval import explore, judge, without_examples
from sample import Example, Sample, Sampler, load_tokenizer
from sft import join, solution_examples

@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A task whose right answer is always 2, task/, and a base model of plain text, base/: questions with
    answers, three in ten of them 2 and the others 3, among other lines, a few to a document."""
    folder = tmp_path_factory.mktemp('few_shot')
    coins = [coin_problem(i) for i in range(320)]
    write_task(folder, {'train': coins, 'test': coins[:16]})
    rng, texts = random.Random(0), []
    for i in range(1500):
        p = coin_problem(i * 7 % 320, 1 if rng.random() < 0.3 else 2)
        texts.append(prompt(p.question) + completion(p.solution) if i % 3 else f'Here is line {i}.')
    (folder / 'base.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    flags = ('--texts_per_row=4 --n_layer=1 --n_head=2 --n_kv_head=2 --n_embd=32 --n_merges=60 --lr=5e-3 '
             '--block_size=256 --eval_problems=8 --max_steps=250 --batch_size=8 --min_lr=5e-4 '
             f'--max_new_tokens=30 --device=cpu --task={folder}/task --text_file={folder}/base.jsonl')
    run_script('sft.py', *flags.split(), f'--out_dir={folder}/base')
    return folder

def run(name, base, out, flags, code=0):
    return run_script(f'{name}.py', f'--task={base}/task', f'--init_from={base}/base', f'--out_dir={out}',
                      '--few_shot=2', '--max_new_tokens=40', '--device=cpu', *flags.split(), code=code)

def test_a_solution_ends_where_the_next_question_begins(bpe):
    problem, right = Problem('What?', '1+1=<<1+1=2>>2\n#### 2', '2'), ' 1+1=<<1+1=2>>2\n#### 2'

    def judged(text):
        return judge(problem, Sample([], bpe.encode(text), [], True), bpe, stop=(NEXT_QUESTION,))
    # what an answer to another question says does not count
    assert not judged(' so\n#### 3\n\nQuestion: And now?\nAnswer: #### 2').correct
    s = judged(right + '\n\nQuestion:')
    assert s.correct and s.text == right + '\n'
    # as an episode: the ids stay, and the reward of the answer's step stands on the last of them
    assert [text for _, text in s.lines] == ['1+1=<<1+1=2>>2', '#### 2'] and s.ends[-1] == len(s.ids) - 1
    assert rewards.sparse_rewards([s]).nonzero().tolist() == [[0, len(s.ids) - 1]]
    # to learn from: up to the answer's line, with an EOS, as solution_examples would write it
    for text in (right + '\n\nQuestion:', right, right + '\nHere is line 3.\n'):
        row = without_examples(judged(text)).example
        assert bpe.decode(row.ids[:row.n_prompt]) == prompt('What?')
        assert bpe.decode(row.ids[row.n_prompt:]) == right and row.ids[-1] == bpe.eos

def test_explore_shows_the_examples_and_learns_without_them(bpe, tmp_path):
    problems, prompts = [Problem(f'What {i}?', 'so\n#### 2', '2') for i in range(3)], []

    def generate(given, k, budgets, temperature, stop, **_):
        prompts.extend(bpe.decode(p) for p in given)
        assert stop == (NEXT_QUESTION,)
        return [Sample(p, bpe.encode(' so\n#### 2\n\nQuestion:'), [], True) for p in given for _ in range(k)]
    sampler = Sampler(tiny(bpe.vocab_size, block_size=1000), bpe)
    sampler.generate = generate
    found = explore(sampler, problems[1:], str(tmp_path / 'f'), 2, 50, 1.0, 0, '', problems[:1])
    shown = 'Question: What 0?\nAnswer: so\n#### 2\n\n'
    assert prompts == [f'{shown}Question: What {i}?\nAnswer:' for i in (1, 2)]
    assert all(bpe.decode(s.ids) == ' so\n#### 2' and s.correct for s in sum(found, []))
    assert join(['a', 'b', 'c'], 2) == ['a\n\nb', 'c']

def test_expert_iteration_from_a_base_model_learns_what_is_right_and_where_it_ends(base, tmp_path):
    run('ei', base, tmp_path, '--include_sft=False --n_questions=30 --k=8 --n_rounds=2 --lr=3e-3 '
        f'--max_steps=20 --batch_size=16 --min_lr=3e-4 --eval_problems=8 --base={base}/base')
    assert [len(log_of(tmp_path, key)) for key in ('prompted_maj1', 'val_maj1')] == [1, 2]
    # Asked without examples it now gives the right answer and ends there. Over seeds ln P(right, EOS) rose
    # by 4.3 to 7.8, and ended 6 to 19 above ln P(wrong, EOS).
    (before, _), (right, wrong) = (
        coin_logprobs(folder, lambda p, tokenizer: solution_examples([p], tokenizer)[0])
        for folder in (base / 'base', tmp_path / 'round1'))
    assert right > before + 2 and right > wrong + 2
    # the second round, which shows no examples, is the fine-tuned model's own
    eos = load_tokenizer(str(base / 'base')).eos
    drawn = [s for row in rows_of(tmp_path / 'samples_round2.jsonl') for s in row['samples']]
    assert all(s['ids'][-1] == eos for s in drawn if s['finished'])

def test_ppo_from_a_base_model(base, tmp_path):
    run('ppo', base, tmp_path, '--n_questions=60 --n_iterations=4 --n_rollouts=64 --minibatch=32 --epochs=1 '
        '--temperature=1 --advantage=group --kl_coef=0 --lr=1e-3 --eval_problems=16')
    shown = load_problems(f'{base}/task', 'val')[:2]

    def few_shot(problem, tokenizer):
        question = prompt(problem.question, shown)
        prompt_ids, ids = tokenizer.encode_pair(question, completion(problem.solution))
        return Example(prompt_ids + ids, len(prompt_ids))
    start, end = (coin_logprobs(folder, few_shot) for folder in (base / 'base', tmp_path / 'last'))
    assert (end[0] - end[1]) - (start[0] - start[1]) > 0.5  # over seeds the log-odds rose by 1.6 to 9
    assert all(NEXT_QUESTION not in s['text'] for s in rows_of(tmp_path / 'samples.jsonl'))
    # evaluated as it was trained; and of the validation slice without the examples themselves
    run('eval', base, tmp_path, f'--init_from={tmp_path} --split=val --n_problems=8 --k=2')
    questions = [row['question'] for row in rows_of(tmp_path / 'eval_task.jsonl')]
    assert questions == [f'What is number {i}?' for i in range(66, 74)]  # the slice starts at 64

@pytest.mark.parametrize('name, flags, said', [
    ('ei', '--reset=previous --few_shot=256', 'few_shot is from 0 to 255'),
    ('ei', '--reset=previous --max_new_tokens=200', 'no question fits the context of 256'),
    ('ppo', '--max_new_tokens=240', 'exceed the context of 256'),
    ('ppo', '--reward=orm --reward_model=x', "few_shot goes with reward = 'sparse' or 'dense'")])
def test_bad_input(base, tmp_path, name, flags, said):
    error = run(name, base, tmp_path / 'run', '--n_questions=60 ' + flags, code=2).stderr
    assert said in error and error.strip().count('\n') == 0 and not (tmp_path / 'run').exists()
