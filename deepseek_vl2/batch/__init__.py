"""Many pictures at once: `python -m deepseek_vl2.batch`.

A source lists items (a question with its pictures) by number. A window of items is sorted by length, cut into batches
and answered; each answer is on the disk before the next batch begins. The end of a run puts the answers in the items'
order.
"""
