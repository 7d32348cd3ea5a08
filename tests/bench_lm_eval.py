"""
Does lm-evaluation-harness call the same solutions right? The stop strings, filters and metric of its gsm8k
task's yaml, on the texts of evaluations: strict-match beside our strict check, flexible-extract beside our
lenient one. Disagreements are counted by reason, each with an example. A run by hand, not a test.

$ python tests/bench_lm_eval.py out/demo_sft/eval_arithmetic.jsonl ...    # after pip install lm_eval
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import extract_answer, lenient_answer, same_answer

def reason(sample, kept):
    """Why the two may disagree. kept: the sample's text, as far as the harness generates it."""
    if kept != sample['text']:
        return 'the harness stops earlier'
    return 'another number is read' if sample['finished'] else 'unfinished, so wrong with us'


if __name__ == '__main__':
    try:
        import yaml
        from lm_eval import filters
        from lm_eval.api.metrics import exact_match_fn
        from lm_eval.models.utils import postprocess_generated_text
    except ImportError as error:
        sys.exit(f'{error}: pip install lm_eval')
    task = yaml.safe_load((Path(filters.__file__).parents[1] / 'tasks/gsm8k/gsm8k.yaml').read_text())
    metric, stop = task['metric_list'][0], task['generation_kwargs']['until']
    options = {key: metric[key] for key in ('ignore_case', 'ignore_punctuation', 'regexes_to_ignore')}
    for path in sys.argv[1:]:
        rows = map(json.loads, Path(path).read_text(encoding='utf-8').splitlines())
        samples = [(row['answer'], s) for row in rows for s in [row['greedy'], *row['samples']]]
        kept = [postprocess_generated_text(s['text'], stop, None) for _, s in samples]
        for pipeline, read in zip(task['filter_list'], (extract_answer, lenient_answer)):
            found, right, cases = [[text] for text in kept], [], {}
            for step in map(dict, pipeline['filter']):
                found = list(filters.get_filter(step.pop('function'))(**step).apply(found, None))
            for (answer, s), text, theirs in zip(samples, kept, found):
                ours = read(s['text'])
                score = exact_match_fn(predictions=[theirs], references=[answer], **options)
                right.append((s['finished'] and same_answer(ours, answer), score['exact_match'] == 1))
                if right[-1][0] != right[-1][1]:
                    cases.setdefault(reason(s, text), []).append((answer, ours, theirs, s['text']))
            n_ours, n_theirs = (sum(verdicts[i] for verdicts in right) for i in (0, 1))
            print(f'{path}, {pipeline["name"]}: of {len(right)} right: ours {n_ours}, theirs {n_theirs}')
            for why, examples in cases.items():
                print(f'  {len(examples)} disagree, {why}; reference, ours, theirs, text: {examples[0]}')
