"""The benchmarks behind `sleep-ops bench`: one command, one long-format CSV, one figure.

settings                    what the commands can be set to
cases, providers, checks    what is measured, by whom, and whether it is right
harness                     how: time, memory, taking turns, the machine
passes, kernels, training   the commands passes, kernels, train
tune                        the launch table of the kernels
launches                    every kernel launch alone
plot                        the figures
"""
