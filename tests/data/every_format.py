"""The same prompt and answer in every format whose columns hold messages."""

from tests.data.shared_data import assistant, user

ASKED, OLD = [user("weather?")], [assistant("old")]


def calling(arguments, **more):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **more}


def rows_with(prompt, answer):
    """The same prompt and preferred answer in each format whose columns may hold messages."""
    other = {"role": "assistant", "content": "old"}
    pair = {"chosen": [answer], "rejected": [other]}
    responses = {"chosen_response": [answer], "rejected_response": [other]}
    return {
        "trl": {"prompt": prompt} | pair,
        "trl, whole": {"chosen": [*prompt, answer], "rejected": [*prompt, other]},
        "trl_unpaired": {"prompt": prompt, "completion": [answer], "label": True},
        "ranked": {
            "prompt": prompt,
            "responses": [{"text": [answer], "score": 2}, {"text": [other], "score": 1}],
        },
        "prompt_pairs": {"system": None, "prompt": prompt} | pair,
        "ultra": {"system": "", "chosen": [*prompt, answer], "rejected": [*prompt, other]},
        "messages": {"messages": prompt} | pair,
        "messages_kto": {"messages": [*prompt, answer], "label": True},
        "sharegpt": {"conversations": prompt, "chosen": answer, "rejected": other},
        "swift": {"messages": [*prompt, answer], "rejected_response": [other]},
        "nemo": {
            "context": prompt,
            "completions": [{"rank": 0, "completion": [answer]}, {"rank": 1, "completion": [other]}],
        },
        "nemo_aligner": {"prompt": prompt} | responses,
        "nectar": {
            "prompt": prompt,
            "answers": [{"answer": [answer], "rank": 1}, {"answer": [other], "rank": 2}],
        },
        "openai": {
            "input": {"messages": prompt},
            "preferred_output": [answer],
            "non_preferred_output": [other],
        },
    }


FORMATS = list(rows_with([], {}))
