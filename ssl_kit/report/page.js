"use strict";
(() => {
  const root = document.documentElement;
  const themes = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  const remember = { // a page opened from a file may have no storage
    get() { try { return localStorage.getItem("ssl_kit_theme"); } catch { return null; } },
    set(value) { try { localStorage.setItem("ssl_kit_theme", value); } catch { /* the choice lasts for this view */ } },
  };
  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  // the computed colour of a variable: light-dark() is only resolved where it is used
  const colour = (name) => { probe.style.color = `var(${name})`; return getComputedStyle(probe).color; };
  const documents = () => (window.Bokeh ? Bokeh.documents : []);

  function restyle() {
    for (const doc of documents()) {
      for (const chart of doc.roots()) {
        for (const model of chart.references()) {
          for (const tag of model.tags ?? []) {
            const [property, name] = String(tag).split("=");
            if (name?.startsWith("--")) model[property] = colour(name);
          }
        }
      }
    }
    map?.paint();
  }

  function setTheme(theme) {
    if (theme === "auto") root.removeAttribute("data-theme"); else root.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
    button.dataset.theme = theme;
    restyle();
  }

  button.addEventListener("click", () => {
    const theme = themes[(themes.indexOf(button.dataset.theme) + 1) % themes.length];
    remember.set(theme);
    setTheme(theme);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);

  for (const copy of document.querySelectorAll("button[data-copy]")) {
    copy.addEventListener("click", async () => {
      const code = copy.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        copy.textContent = "Copied";
      } catch { // no permission for a page from a file: select it instead
        getSelection().selectAllChildren(code);
        copy.textContent = "Selected";
      }
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    });
  }

  // Pictures open large: by a click, Enter or Space; the arrows go on to the next one, Esc closes.
  const SMALL = 200; // pixels, below which they are enlarged as squares
  const shown = document.querySelectorAll(".thumbs img, .strip img, .wrongs img, .prototypes img, .lookrow img, .hits img, .asked img, .picture img");
  const large = document.createElement("dialog");
  const [picture, told, buttons] = ["img", "p", "div"].map((tag) => document.createElement(tag));
  large.append(told, buttons);
  large.setAttribute("aria-label", "Picture");
  let at = 0;

  function open(place) {
    at = (place + shown.length) % shown.length;
    const { src, alt, title, naturalWidth } = shown[at];
    Object.assign(picture, { src, alt, className: naturalWidth < SMALL ? "small" : "" });
    told.textContent = title && !alt.includes(title) ? `${alt} (${title})` : alt;
    large.prepend(picture);
    if (!large.open) large.showModal();
  }
  for (const [text, act] of [["Previous", () => open(at - 1)], ["Next", () => open(at + 1)], ["Close", () => large.close()]]) {
    const one = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    one.addEventListener("click", act);
    buttons.append(one);
  }
  large.addEventListener("keydown", ({ key }) => {
    if (key === "ArrowLeft") open(at - 1);
    if (key === "ArrowRight") open(at + 1);
  });
  large.addEventListener("click", ({ target }) => { if (target === large) large.close(); });
  large.addEventListener("close", () => { picture.remove(); shown[at].focus(); });
  if (shown.length) document.body.append(large);
  for (const [place, one] of shown.entries()) {
    one.tabIndex = 0;
    one.setAttribute("role", "button");
    one.addEventListener("click", () => open(place));
    one.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      open(place);
    });
  }

  // While a run goes on the page looks again, where it was scrolled to; not while somebody looks at a picture.
  const { reload, written } = document.body.dataset;
  const kept = `ssl_kit_scroll ${location.pathname}`;
  function again() {
    if (large.open || document.hidden) return setTimeout(again, 1000);
    try { sessionStorage.setItem(kept, String(scrollY)); } catch { /* the browser keeps it, nearly */ }
    location.reload();
  }
  function scrollBack() {
    try {
      const place = sessionStorage.getItem(kept);
      sessionStorage.removeItem(kept);
      if (place !== null) scrollTo({ top: Number(place), behavior: "instant" });
    } catch { /* a page opened from a file may have no storage */ }
  }
  if (reload) setTimeout(again, 1000 * Number(reload));

  // A run writes this page every two minutes (verbs/monitor.py). One that was killed cannot say so: the page does.
  const old = (Date.now() / 1000 - Number(written)) / 60;
  const stale = document.getElementById("stale");
  if (stale && old >= 10) {
    stale.querySelector("span").textContent = String(Math.floor(old));
    stale.hidden = false;
  }

  // The map: class buttons dim the other classes, a click pins an image and what lies next to it.
  let map = null;

  function openMap() {
    const source = documents().map((doc) => doc.get_model_by_name("map")).find(Boolean);
    const pins = document.getElementById("pins");
    if (!source || !pins) return null;
    const data = () => source.data;
    const length = data().label.length;
    const uri = (i) => `data:image/webp;base64,${data().thumb[i]}`;
    const title = (i) => `${data().name[i] ? `${data().name[i]}, ` : ""}image ${data().index[i]}`;
    let chosen = null;

    function element(tag, properties, ...children) {
      const node = Object.assign(document.createElement(tag), properties);
      node.append(...children);
      return node;
    }
    function nearest(i, count) {
      const { x, y } = data();
      const far = (j) => (x[i] - x[j]) ** 2 + (y[i] - y[j]) ** 2;
      return [...Array(length).keys()].filter((j) => j !== i).sort((a, b) => far(a) - far(b)).slice(0, count);
    }
    function pin(i) {
      pins.querySelector(".empty")?.remove();
      pins.querySelector(`[data-row="${i}"]`)?.remove();
      const near = element("div", { className: "near" });
      for (const j of nearest(i, 8)) near.append(element("img", { src: uri(j), alt: title(j), title: title(j) }));
      const card = element("div", { className: "card" }, element("img", { src: uri(i), alt: title(i) }));
      const text = element("div", {}, element("b", { textContent: data().name[i] || "unlabelled" }),
        element("div", { className: "muted", textContent: `image ${data().index[i]}` }));
      const unpin = element("button", { type: "button", textContent: "Unpin" });
      unpin.addEventListener("click", () => card.remove());
      text.append(unpin);
      card.dataset.row = i;
      card.append(text, element("div", { style: "grid-column: 1 / -1", className: "muted" }, "beside it on the map", near));
      pins.prepend(card);
      while (pins.children.length > 4) pins.lastElementChild.remove();
    }
    function paint() {
      const palette = Array.from({ length: 10 }, (_, i) => colour(`--c${i}`));
      const grey = colour("--muted");
      const labels = Array.from(data().label);
      source.data = {
        ...data(),
        color: labels.map((label) => (label < 0 ? grey : palette[label % 10])),
        alpha: labels.map((label) => (chosen === null ? 0.8 : label === chosen ? 0.95 : 0.08)),
      };
    }
    source.selected.properties.indices.change.connect(() => {
      const picked = Array.from(source.selected.indices);
      if (picked.length) pin(picked[picked.length - 1]);
    });
    const classes = [...document.querySelectorAll("button[data-class]")];
    for (const one of classes) {
      one.addEventListener("click", () => {
        const label = Number(one.dataset.class);
        chosen = chosen === label ? null : label;
        for (const other of classes) other.setAttribute("aria-pressed", String(Number(other.dataset.class) === chosen));
        paint();
        if (chosen !== null) pin(middle(chosen));
      });
    }
    // the image closest to the middle of its class: a typical one, and a way to pin with the keyboard
    function middle(label) {
      const { x, y } = data();
      const rows = [...Array(length).keys()].filter((i) => data().label[i] === label);
      const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];
      const [cx, cy] = [median(rows.map((i) => x[i])), median(rows.map((i) => y[i]))];
      return rows.reduce((best, i) => ((x[i] - cx) ** 2 + (y[i] - cy) ** 2 < (x[best] - cx) ** 2 + (y[best] - cy) ** 2 ? i : best));
    }
    return { paint };
  }

  const saved = remember.get();
  setTheme(themes.includes(saved) ? saved : "auto");
  scrollBack();
  if (!window.Bokeh) return;
  // BokehJS embeds after DOMContentLoaded and fills Bokeh.documents; wait for it, then colour the charts
  const wanted = document.querySelectorAll("[data-root-id]").length;
  const ready = () => {
    const rendered = documents().reduce((sum, doc) => sum + doc.roots().length, 0);
    if (rendered < wanted) return setTimeout(ready, 30);
    map = openMap();
    restyle();
  };
  ready();
})();
