"""The built-in world: invented people whose facts hold a known number of bits, and two ways to write about them.

In: a number of people and a seed. Out: sentences as prompts and completions, and the questions that measure recall.
Nothing here needs torch, a network or a file.
"""
