// An image whose patches are pressed: to hide them, or to say which one asks.
function render({ model, el }) {
  const board = document.createElement("canvas"), g = board.getContext("2d"), size = 224;
  const picture = new Image();
  let here = 0; // the patch that the keyboard is on
  Object.assign(board, { width: size, height: size, tabIndex: 0, className: "refiner-patches" });
  board.setAttribute("role", "application");
  board.style.cssText = "cursor:pointer;image-rendering:pixelated;touch-action:manipulation";
  const side = () => model.get("side");
  function draw() {
    const step = size / side(), value = model.get("value");
    g.imageSmoothingEnabled = false;
    g.drawImage(picture, 0, 0, size, size);
    value.forEach((on, i) => {
      const x = (i % side()) * step, y = Math.floor(i / side()) * step;
      [g.fillStyle, g.strokeStyle, g.lineWidth] = ["rgba(110,110,110,.8)", "rgba(255,255,255,.5)", 0.5];
      if (on && !model.get("alone")) g.fillRect(x, y, step, step);
      g.strokeRect(x, y, step, step);
      const marked = on && model.get("alone"), focused = i === here && board === document.activeElement;
      [g.strokeStyle, g.lineWidth] = [focused ? "#e69f00" : "#d55e00", 3];
      if (marked || focused) g.strokeRect(x + 1.5, y + 1.5, step - 3, step - 3);
    });
    const pressed = value[here] ? "pressed" : "not pressed";
    board.setAttribute("aria-label", `${model.get("label")}: patch ${here}, ${pressed}. Arrows move, space presses.`);
  }
  function press(i) {
    here = i;
    const old = model.get("value");
    model.set("value", old.map((on, j) => (j === i ? !on : on && !model.get("alone"))));
    model.save_changes();
    draw();
  }
  board.onclick = (e) => {
    const at = (z) => Math.min(Math.floor((z / board.clientWidth) * side()), side() - 1);
    press(at(e.offsetX) + side() * at(e.offsetY));
  };
  board.onkeydown = (e) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: side(), ArrowUp: -side() }[e.key];
    if (e.key === " " || e.key === "Enter") press(here);
    else if (step && here + step >= 0 && here + step < side() ** 2) here += step, draw();
    else return;
    e.preventDefault();
    e.stopPropagation();
  };
  board.onfocus = board.onblur = picture.onload = draw;
  const load = () => (picture.src = model.get("picture"));
  model.on("change:value", draw);
  model.on("change:picture", load);
  load();
  el.append(board);
}
export default { render };
