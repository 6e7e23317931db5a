"""Benchmarks: answers of a model, judged by the field's metrics: `python -m deepseek_vl2.evaluate --help`.

The way of the data: `readers` file -> samples; `tasks` sample -> prompt; `runner` prompts -> predictions.jsonl;
`judges` answer -> judgement, by the pure functions of `metrics` and `choices`; `results` judgements -> results.json;
`report` -> report.html.
"""
