"""What is behind `sleep-ops verify`: everything that can be confirmed and measured on the machine at hand.

steps                            what is done, in order, and what each step needs
run                              one step after another, each in a process of its own with its share of the time
report                           report.md, from what the steps left behind
machine, checks, graph, rule110  steps that no other command does
"""
