"""The curve of a training with two phases, drawn in a real browser."""


def test_a_second_phase_is_marked_and_has_a_line_of_its_own(screen):
    """Ten steps of the first phase and five of the second, of twenty in all: the mark is at half of
    the width, and no line crosses it.
    """
    drawn = screen.page.evaluate("""async () => {
      const { drawChart } = await import("/extensions/ComfyUI-Nibble/charts.mjs");
      const points = Array.from({ length: 15 }, (_, i) => [i + 1, i < 10 ? 1 : 5]);
      const draw = (phases) => {
        const root = drawChart({ kind: "curve", title: "t", summary: [], points, smooth: points,
          steps: 20, lowest: [15, 5], ...phases }).shadowRoot;
        const all = (selector, read) => [...root.querySelectorAll(selector)].map(read);
        return [all("path.nibble-line", (path) => path.getAttribute("d").split("L").length),
          all("line.nibble-phase", (mark) => mark.getAttribute("x1")),
          all(".nibble-groups > span",
            (name) => [name.textContent, name.style.left, name.style.width])];
      };
      return [draw({ phases: [["velocity", 0], ["<b>next</b>", 10]] }), draw({})];
    }""")
    assert drawn == [
        [[10, 5], ["50%"], [["velocity", "0%", "50%"], ["<b>next</b>", "50%", "50%"]]],
        [[15], [], []],
    ]
