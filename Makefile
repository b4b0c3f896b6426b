# What people need often. `make run` is the README's first command.
.PHONY: run check test slow golden

run:
	accelerate launch --config_file launch/one_cpu.yaml -m rgrl train --config recipes/reviews/rgrl.yaml

check:
	pre-commit run --all-files

test:
	pytest -m "not slow"

slow:
	pytest -m slow

golden:
	RGRL_WRITE_GOLDEN=1 pytest -n 0 tests/golden
