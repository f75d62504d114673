"""The controls of the Steer tab, and the places where a run is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from steering.apps.demo_forms import Field
from steering.apps.demo_session import Host
from steering.registry import METHODS

EXAMPLE = "a photo of a red apple and a blue clock"
COPY = """async (text) => {
  try { await navigator.clipboard.writeText(text); }
  catch {  // only secure pages have a clipboard
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const button = document.activeElement, words = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = words; }, 1500);
}"""


@dataclass(frozen=True)
class Asked:
    """The controls every run needs, in the order of a listener's inputs."""

    prompt: gr.Textbox
    model: gr.Dropdown
    heldout: gr.CheckboxGroup
    nfe: gr.Number
    seed: gr.Number
    steps: gr.Textbox
    scale: gr.Textbox
    compare: gr.Checkbox

    def listed(self) -> list[Any]:
        return [getattr(self, f.name) for f in fields(self)]


@dataclass(frozen=True)
class Shown:
    """Where a run is shown."""

    status: gr.HTML
    best: gr.HTML
    plots: gr.HTML
    gallery: gr.HTML
    result: gr.HTML
    tree: gr.HTML
    file: gr.DownloadButton
    python: gr.Textbox
    command: gr.Textbox

    def listed(self) -> list[Any]:
        return [getattr(self, f.name) for f in fields(self)]

    def cleared(self) -> dict[Any, Any]:
        """Nothing left of an earlier run."""
        found: dict[Any, Any] = dict.fromkeys(self.listed()[:6], "")
        found |= {self.file: gr.DownloadButton(value=None, interactive=False)}
        return found | {self.python: "", self.command: ""}


def rewards_control(host: Host, label: str = "Rewards that guide") -> gr.CheckboxGroup:
    names = list(host.offer.rewards)
    return gr.CheckboxGroup(
        names, value=[first_reward(host)], label=label, elem_classes="st-many", interactive=True
    )


def weight_controls(host: Host, chosen: gr.CheckboxGroup) -> list[gr.Number]:
    """A weight for each reward offered; those of the chosen ones are shown."""

    def shown(names: list[str], name: str) -> Any:  # noqa: ANN401
        return True if name in names else "hidden"

    first = [first_reward(host)]
    weights = [
        gr.Number(1.0, label=f"Weight of {n}", visible=shown(first, n), interactive=True)
        for n in host.offer.rewards
    ]
    chosen.change(
        lambda names: [gr.Number(visible=shown(names, n)) for n in host.offer.rewards],
        chosen,
        weights,
        show_progress="hidden",
        api_visibility="private",
    )
    return weights


def first_reward(host: Host) -> str:
    """The reward chosen before a person chooses."""
    return "clip" if "clip" in host.offer.rewards else host.offer.rewards[0]


def heldout_control(host: Host) -> gr.CheckboxGroup:
    names = list(host.offer.rewards)
    return gr.CheckboxGroup(
        names,
        value=["detector"] if "detector" in names and names != ["detector"] else [],
        label="Held-out verifiers",
        info="They judge the result; the search never sees them.",
        elem_classes="st-many",
        interactive=True,
    )


def model_control(host: Host) -> gr.Dropdown:
    offer = host.offer
    return gr.Dropdown(
        list(offer.models),
        value=offer.models[0],
        label="Model",
        interactive=True,
        info="Or type a folder or hub id." if offer.any_model else None,
        allow_custom_value=True,  # what is not offered is refused with a message of its own
    )


def form(host: Host) -> Asked:
    limits = host.offer.limits
    prompt = gr.Textbox(EXAMPLE, label="Prompt", elem_id="prompt", max_lines=4, interactive=True)
    model = model_control(host)
    with gr.Row():
        nfe = gr.Number(
            320,
            label="Budget",
            precision=0,
            elem_id="nfe",
            min_width=120,
            info=f"Network rows, up to {limits.nfe}; guidance counts 2.",
            interactive=True,
        )
        seed = gr.Number(
            0,
            label="Seed",
            precision=0,
            elem_id="seed",
            min_width=120,
            info="Names all random numbers.",
            interactive=True,
        )
    with gr.Accordion("Model call and verifiers", open=False):
        with gr.Row():
            # Text, as number fields of browsers turn empty into 0.
            steps = gr.Textbox(
                "",
                label="Denoising steps",
                elem_id="steps",
                info="Empty: the model's own.",
                min_width=120,
                interactive=True,
            )
            scale = gr.Textbox(
                "",
                label="Guidance scale",
                info="Empty: the model's own.",
                min_width=120,
                interactive=True,
            )
        heldout = heldout_control(host)
        compare = gr.Checkbox(
            True,
            label="Compare with unsteered and best-of-N at the same cost",
            elem_id="beside",
            interactive=True,
        )
    return Asked(prompt, model, heldout, nfe, seed, steps, scale, compare)


def show() -> Shown:
    status = gr.HTML(elem_id="status")
    best = gr.HTML(elem_id="best")
    result = gr.HTML(elem_id="result")
    file = gr.DownloadButton("Download PNG with recipe", interactive=False, elem_id="download")
    plots = gr.HTML(elem_id="plots")
    gallery = gr.HTML(elem_id="gallery")
    tree = gr.HTML(elem_id="tree")
    with gr.Accordion("The same run elsewhere", open=False):
        # Buttons of their own: the one inside a text box would take its label.
        python = gr.Textbox(label="Python", lines=8, buttons=[], interactive=False)
        copy_button("Copy Python", python)
        command = gr.Textbox(label="Command line", lines=3, buttons=[], interactive=False)
        copy_button("Copy command line", command)
    return Shown(status, best, plots, gallery, result, tree, file, python, command)


def copy_button(label: str, source: gr.Textbox) -> None:
    """A button that puts a text on the clipboard."""
    button = gr.Button(label, size="sm")
    button.click(None, source, None, js=COPY, api_visibility="private", show_progress="hidden")


def controls(method: str, preset: str, fields: list[Field]) -> list[Any]:
    """A control per option, holding the preset's value where it sets one."""
    given: Mapping[str, Any] = METHODS.get(method).presets.get(preset, {})
    made = []
    with gr.Accordion(f"Options of {method}", open=False, key=f"options-{method}"):
        for f in fields:
            value = f.shown(given.get(f.name, f.default))
            label = f.name.replace("_", " ")
            common = {
                "label": label,
                "interactive": True,
                "info": f.help or None,
                "key": f"{method}-{preset}-{f.name}",
            }
            if f.kind == "flag":
                made.append(gr.Checkbox(value, **common))
            elif f.kind == "choice":
                made.append(gr.Dropdown(list(f.choices), value=value, **common))
            elif f.kind == "list" or f.written:
                made.append(gr.Textbox(value, **common))
            else:
                precision = 0 if f.kind == "whole" else None
                made.append(gr.Number(value, precision=precision, **common))
    return made
