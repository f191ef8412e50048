from sleep_ops.cli import main

main()
