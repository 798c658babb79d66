"""The embedded composer: rondos and variations made from themes of our own, deterministic, for corpora without a
download. May import `music` and `console`.
"""
