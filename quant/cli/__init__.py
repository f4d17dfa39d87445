"""The terminal's commands of quant: nibble {quantize,inspect,plan,convert,partials}.

methods.py   which method a recipe belongs to
quantize.py  a model's quantized file, calibrated outside ComfyUI where the preset wants it
shares.py    the whole of a target, one part of it, or the whole of its parts
measure.py   the 16-bit model at work, outside ComfyUI
inspect.py   what a file holds, or what quantizing it would give
plan.py      what encoding, sampling and decoding will take of a card and of RAM
convert.py   a 4-bit file in another program's format
partials.py  files of stopped runs: listed, removed
options.py   what can be typed
by_name.py   the same given by names, for programs
console.py   a progress bar, and lines for people
driven.py    lines for a program that runs `quantize`
"""

_EXAMPLES = """examples:
  {nibble} quantize flux1-dev.safetensors flux1-dev-svdq-int4.safetensors
  {nibble} quantize model.safetensors model-int4.safetensors --preset best --rank 64 \
--prompts prompts.safetensors
  {nibble} quantize model.safetensors model-vq3.safetensors --method vq --bits 3 --preset best
  {nibble} inspect flux1-dev-svdq-int4.safetensors
  {nibble} inspect --plan flux1-dev
  {nibble} inspect --plan flux1-dev --method vq --bits 2
  {nibble} plan flux1-dev --card "8 GB"
  {nibble} convert svdq-int4_r32-flux.1-dev.safetensors flux1-dev-nibble.safetensors --to nibble
  {nibble} partials
  {nibble} farm jobs.yaml --address auto
  {nibble} demo --out demo.png
  {nibble} bench --env
"""  # a backslash at the end of a line: commands are printed whole


def examples(program: str) -> str:
    """Commands to copy; program: how a command begins, such as 'nibble'."""
    return _EXAMPLES.replace("{nibble}", program)
