"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const methods = new Map(data.methods.map((method) => [method.name, method]));
  const [known, ...unknown] = data.sets;
  const colours = { known: "#8a8a8a", unknown: "#b03a2e", chosen: "#1b6ca8", other: "#d5d5d5" };
  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;

  // ---------------------------------------------------------------- the table

  function sort(table, column) {
    const head = table.tHead.rows[1].cells[column];
    const falling = head.getAttribute("aria-sort") !== "descending" && column > 0
      || head.getAttribute("aria-sort") === "ascending";
    for (const cell of table.tHead.rows[1].cells) cell.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const value = (row) => {
      const cell = row.cells[column];
      return cell.dataset.value === undefined ? cell.textContent.trim() : cell.dataset.value;
    };
    const compare = (one, other) => {
      if (one === "" || other === "") return (one === "") - (other === ""); // what is missing is last, either way
      const order = column ? Number(one) - Number(other) : one.localeCompare(other);
      return falling ? -order : order;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort((one, other) => compare(value(one), value(other))));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[1].cells].forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => sort(table, column));
    });
  }

  // ---------------------------------------------------------------- histograms and ROC curves

  const font = { family: "system-ui, sans-serif", size: 11 };
  const settings = { displayModeBar: false, responsive: true };

  function histogram(place, method, images) {
    const found = method.sets[images.name];
    const [low, high] = found.bins;
    const width = (high - low) / found.known.length;
    const bars = (shares, name, colour) => ({
      type: "bar", name, x: shares.map((_, at) => low + (at + 0.5) * width), y: shares, width,
      marker: { color: colour }, opacity: 0.6, hovertemplate: "%{x:.4g}: %{y:.1%}",
    });
    const line = { type: "line", x0: method.threshold, x1: method.threshold, yref: "paper", y0: 0, y1: 1, line: { dash: "dot", width: 1.5 } };
    Plotly.react(place, [
      bars(found.known, `ID: ${known.name}`, colours.known), bars(found.unknown, `OOD: ${images.name}`, colours.unknown),
    ], {
      barmode: "overlay", bargap: 0, font, margin: { l: 40, r: 10, t: 30, b: 35 }, shapes: [line],
      legend: { orientation: "h", y: 1.15 }, xaxis: { title: { text: "score" } }, yaxis: { tickformat: ".0%" },
    }, settings);
  }

  function roc(place, method, images) {
    const curve = (one) => ({
      type: "scatter", mode: "lines", name: one.title, x: one.sets[images.name].lost, y: one.sets[images.name].caught,
      line: { width: one === method ? 2.5 : 1, color: one === method ? colours.chosen : colours.other },
      hovertemplate: `${one.title.replace(/[<>&]/g, "")}: %{y:.1%} caught, %{x:.1%} lost<extra></extra>`,
    });
    const others = data.methods.filter((one) => one !== method);
    Plotly.react(place, [...others, method].map(curve), {
      showlegend: false, hovermode: "closest", font, margin: { l: 45, r: 20, t: 10, b: 35 },
      xaxis: { title: { text: "ID lost" }, range: [0, 1], tickformat: ".0%", tickvals: [0, 0.5, 1] },
      yaxis: { title: { text: "OOD caught" }, range: [0, 1.005], tickformat: ".0%" },
    }, settings);
  }

  const charts = unknown.map((images) => {
    const parts = { images, title: element("h3"), histogram: element("div", { className: "plot" }), roc: element("div", { className: "plot" }) };
    document.getElementById("charts").append(element("div", { className: "charts" }, parts.title, parts.histogram, parts.roc));
    return parts;
  });

  // ---------------------------------------------------------------- images

  const viewer = document.getElementById("viewer");
  const called = (number) => data.classes[number] ?? `class ${number}`;
  const described = (one) => {
    const of = one.label < 0 ? "no class of the network's" : called(one.label);
    return `${of}, predicted ${called(one.pred)}, score ${one.score.toPrecision(5)}`;
  };

  function open(method, one) {
    const picture = data.pictures[one.picture];
    viewer.querySelector("h3").textContent = `${one.images}, image ${one.at}`;
    for (const image of viewer.querySelectorAll("img.image")) image.src = picture.image;
    for (const part of viewer.querySelectorAll(".overlaid")) part.hidden = !picture.map;
    if (picture.map) {
      viewer.querySelector("img.map").src = picture.map;
      viewer.querySelector(".most").textContent = picture.most.toPrecision(3);
    }
    viewer.querySelector(".told").textContent = `${method.title}: ${described(one)}; threshold ${method.threshold.toPrecision(5)}.`;
    viewer.showModal();
  }

  function thumbnail(method, one) {
    const picture = data.pictures[one.picture];
    const image = () => element("img", { className: "image", src: picture.image, alt: "" });
    const views = element("div", { className: "views" }, image());
    if (picture.map) {
      const map = element("img", { className: "map", src: picture.map, alt: "" });
      views.append(element("div", { className: "stack" }, image(), map));
    }
    const of = one.label < 0 ? "OOD" : called(one.label);
    const lines = [`${one.images} ${one.at}`, `${of}, predicted ${called(one.pred)}`, `score ${one.score.toPrecision(5)}`];
    const button = element("button", { type: "button" }, views, ...lines.map((line) => element("div", { textContent: line })));
    button.addEventListener("click", () => open(method, one));
    return button;
  }

  viewer.querySelector("input").addEventListener("input", (event) => {
    viewer.querySelector("img.map").style.opacity = event.target.value;
  });

  // ---------------------------------------------------------------- one method

  function show(name) {
    const method = methods.get(name);
    document.getElementById("method").value = name;
    document.getElementById("threshold").textContent =
      `Threshold ${method.threshold.toPrecision(5)} (dotted), which 95 % of ${method.fitted} do not exceed, keeps ${percent(method.kept)} of the ID test images.`;
    for (const { images, title, histogram: left, roc: right } of charts) {
      const found = method.sets[images.name];
      title.textContent = `${images.name} (${images.group}): AUROC ${found.auroc.toFixed(2)} %, ${percent(found.let_in)} let in at the threshold`;
      histogram(left, method, images);
      roc(right, method, images);
    }
    ["wrong-id", "wrong-ood"].forEach((id, side) => {
      document.getElementById(id).replaceChildren(...method.wrong[side].map((one) => thumbnail(method, one)));
    });
    for (const button of document.querySelectorAll("button.method")) {
      button.closest("tr").classList.toggle("chosen", button.dataset.method === name);
    }
  }

  document.getElementById("method").addEventListener("change", (event) => show(event.target.value));
  for (const button of document.querySelectorAll("button.method")) {
    button.addEventListener("click", () => {
      show(button.dataset.method);
      document.getElementById("scores").scrollIntoView();
    });
  }
  const ours = ["sandi_c", "sandi-z", "sandi-a"].find((name) => methods.has(name));
  show(ours ?? data.methods[0].name);
})();
