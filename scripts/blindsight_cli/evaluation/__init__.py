"""Dense against sparse on a file of questions: what `blindsight eval` does.

ITEMS.jsonl ──► items ──► runner ──► samples (one line per item, resumable) ──► result ──► results.json
                  │                                                              │
                  └──► overlap: none of them was calibrated on                   └──► statistics: paired intervals
"""
