"""Shell scripts as configs: which command, which flags, and what only running would tell."""

import pytest

from fastdpo.convert.convert import read
from fastdpo.convert.draft import Unresolved
from fastdpo.errors import ConfigError
from tests.convert.translated import translate


@pytest.fixture
def keys(tmp_path):
    """The keys of a script's text."""

    def write(text: str) -> dict:
        path = tmp_path / "scripts" / "run.sh"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return read(path)

    return write


SWIFT = r"""
#!/bin/bash
set -ex
# swift rlhf --beta 0.9 \
export N=4   # of GPUs
name='two words'
copy=$name
OUT="runs/${copy}"
batch=$((16 / N))
MORE=(
    --lora_rank 8   # of all
    --dataset 'a b.jsonl' "$name.jsonl"
)
MORE+=(--use_hf)
if [ ! -d "$OUT" ]; then mkdir -p "$OUT"; fi

CUDA_VISIBLE_DEVICES=0,1 NPROC_PER_NODE=$N \
    /opt/bin/swift rlhf \
    --model ${MODEL:-org/model} --rlhf_type=simpo \
    --gradient-accumulation-steps $(expr 32 / $N / 2) \
    --per_device_train_batch_size $batch \
    --loss_weights 0.8 1e-1 --save_steps -1 \
    --columns '{"q": "query"}' \
    --system "Say \"$name\" for \$5" --template $'a\nb' \
    --output_dir "$OUT" "${MORE[@]}" $@ > "$OUT/log" 2>&1 | tee all.log
echo done
"""


def test_a_command_with_the_scripts_own_variables(keys):
    assert keys(SWIFT) == {
        "num_processes": 4,
        "model": "org/model",
        "rlhf_type": "simpo",
        "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 4,
        "loss_weights": [0.8, 0.1],
        "save_steps": -1,
        "columns": {"q": "query"},
        "system": 'Say "two words" for $5',
        "template": "a\nb",
        "output_dir": "runs/two words",
        "lora_rank": 8,
        "dataset": ["a b.jsonl", "two words.jsonl"],
        "use_hf": True,
    }


def test_a_command_in_a_heredoc(keys):
    text = r"""
model=org/model
read -r -d '' training_commands <<EOF
openrlhf.cli.train_dpo \
   --pretrain $model \
   --apply_chat_template \
   --adam_betas 0.9 0.98 \
   --beta 0.2
EOF
if [[ ${1} != "slurm" ]]; then
    deepspeed --include localhost:0,1,2 --module $training_commands
fi
"""
    own = {"num_processes": 3, "pretrain": "org/model", "apply_chat_template": True}
    assert keys(text) == own | {"adam_betas": [0.9, 0.98], "beta": 0.2}
    whole = keys(text.replace("<<EOF", "<<'EOF'").replace("\\\n", "\n"))
    assert whole == own | {"pretrain": "$model", "adam_betas": [0.9, 0.98], "beta": 0.2}


@pytest.mark.parametrize(
    "command, own",
    [
        ("openrlhf.cli.train_kto", {"label_key": "label"}),
        ("trl kto", {"loss_type": "kto"}),
        ("trl dpo", {}),
        ("python -m swift.cli.rlhf", {"rlhf_type": "dpo"}),
        ("MAX_PIXELS=$((1280*28*28)) swift rlhf", {"rlhf_type": "dpo", "MAX_PIXELS": 1003520}),
        ("export MAX_PIXELS=9; swift rlhf", {"rlhf_type": "dpo", "MAX_PIXELS": 9}),
        ("MAX_PIXELS=9 llamafactory-cli train", {}),
        ("llamafactory-cli train", {}),
        ("deepspeed --num_gpus 8 src/train_bash.py", {"num_processes": 8}),
        ("torchrun --nproc-per-node=4 --nnodes 2 src/train.py", {"num_processes": 8}),
        ("NNODES=2 NPROC_PER_NODE=2 python src/train.py", {"num_processes": 4}),
        ("accelerate launch --num_processes 2 a/run_orpo.py", {"num_processes": 2, "loss_type": "orpo"}),
        ("uv run python examples/scripts/dpo.py", {}),
        ("axolotl train", {}),
    ],
)
def test_commands(keys, command, own):
    assert keys(f"echo swift rlhf\n{command} --beta 0.5 &\nwait\n") == own | {"beta": 0.5}


def test_flags_win_over_the_commands_file(keys, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/dpo.yaml").write_text("beta: 0.1\nmodel_name_or_path: org/model\n")
    want = {"beta": 0.3, "model_name_or_path": "org/model"}
    launch = "ACCELERATE_LOG_LEVEL=info accelerate launch --config_file recipes/zero3.yaml"
    assert keys(f"{launch} scripts/run_dpo.py recipes/dpo.yaml --beta=0.3") == want  # from a folder above
    assert keys("trl dpo --config recipes/dpo.yaml --beta 0.3") == want
    assert keys("llamafactory-cli train recipes/dpo.yaml beta=0.3") == want
    assert keys("axolotl train ../recipes/dpo.yaml --beta 0.3") == want
    with pytest.raises(
        ConfigError, match=r"its config file nowhere\.yaml is not there, nor from a folder above"
    ):
        keys("trl dpo --config nowhere.yaml")


def test_what_only_running_would_tell_is_told_by_its_key(keys):
    got = keys(
        "for lr in 1e-6 2e-6; do\n"
        "swift rlhf --model $1 --dataset $DATA --learning_rate $lr --beta $(cat beta) --max_length 512 "
        "--output_dir out/$(date +%F) --report_to $REPORT --num_train_epochs `nproc`\ndone"
    )
    unknown = {key: value for key, value in got.items() if isinstance(value, Unresolved)}
    assert unknown == {
        "model": "$1",
        "dataset": "$DATA",
        "learning_rate": "$lr",
        "beta": "$(cat beta)",
        "output_dir": "out/$(date +%F)",
        "report_to": "$REPORT",
        "num_train_epochs": "`nproc`",
    }
    with pytest.raises(ConfigError) as error:
        translate(got)
    told = error.value.args
    assert {line.partition(":")[0] for line in told} == {*unknown} - {"output_dir", "report_to"}
    assert (
        "beta: $(cat beta): only running the file would tell, and it is not run; give its value as a flag"
        in told
    )


def test_a_variable_that_an_if_changes_is_not_known(keys):
    text = "X=1\nif true; then X=2; fi\nY=3\nif true; then Y=3; fi\n[ -d a ] && Z=1 || Z=2\n"
    got = keys(text + "srun --gpus 4 swift rlhf --model m --beta $X --seed $Y --max_length $Z")
    assert [type(got[key]) for key in ("beta", "seed", "max_length")] == [Unresolved, int, Unresolved]


def test_nothing_is_run(keys, tmp_path):
    made = tmp_path / "made"
    keys(f"touch {made}\nX=$(touch {made})\nY=`touch {made}`\nswift rlhf --model $(touch {made}; echo m)")
    assert not made.exists()


@pytest.mark.parametrize(
    "text, told",
    [
        ("echo swift\nswift sft --model m", r"one command that trains is needed, as .*; none is there"),
        ("trl dpo --beta 1\ntrl dpo --beta 2", "there are 2, give each a file of its own"),
        ("trl dpo --beta 1 \\\n# --seed 2 \\\n--seed 3", "--seed: the line before it does not end with"),
        ("trl dpo --config $1", r"the config file is \$1, which only running it would tell; give it"),
        ("trl dpo more --beta 1", "more: what it means in the script's command is not known"),
        ("trl dpo --config a.json b", "b: what it means"),
    ],
)
def test_errors(keys, text, told):
    with pytest.raises(ConfigError, match=told):
        keys(text)


def test_the_same_command_twice_is_one(keys):
    assert keys("trl dpo --beta 1\ntrl dpo --beta 1 && echo done") == {"beta": 1}
