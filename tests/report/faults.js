// What is wrong with the page, in words; [] for nothing. test_browser.py runs it in every theme and width.
(() => {
  const faults = [];
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  const page = document.documentElement; // innerWidth would grow with the page on a phone
  if (page.scrollWidth > page.clientWidth) {
    const clipped = (node) => node && (getComputedStyle(node).overflowX !== "visible" || clipped(node.parentElement));
    const wide = [...document.body.querySelectorAll("*")].filter((node) =>
      node.getBoundingClientRect().right > page.clientWidth && !clipped(node.parentElement));
    const names = wide.map((node) => `${node.tagName}.${node.className}`);
    faults.push(`scrolls sideways: ${page.scrollWidth} of ${page.clientWidth} pixels, ${names.slice(0, 9)}`);
  }
  for (const image of document.images) {
    if (!image.alt.trim()) faults.push(`no alt: ${image.outerHTML.slice(0, 80)}`);
    if (!image.complete || !image.naturalWidth) faults.push(`not drawn: ${image.alt}`);
  }
  const levels = [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map((one) => Number(one.tagName[1]));
  if (levels.filter((level) => level === 1).length !== 1 || levels[0] !== 1) faults.push(`h1: ${levels}`);
  for (const [i, level] of levels.entries()) {
    if (i && level > levels[i - 1] + 1) faults.push(`h${level} right after h${levels[i - 1]}`);
  }
  for (const part of document.querySelectorAll("[aria-labelledby], [aria-describedby]")) {
    for (const name of ["aria-labelledby", "aria-describedby"]) {
      const id = part.getAttribute(name);
      if (id && !document.getElementById(id)?.textContent.trim()) faults.push(`${name} of ${part.tagName}: ${id}`);
    }
  }
  for (const link of document.querySelectorAll("a[href^='#']")) {
    if (!document.getElementById(link.hash.slice(1))) faults.push(`leads nowhere: ${link.hash}`);
  }

  // text against what is behind it, WCAG 2.2 success criterion 1.4.3
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const linear = (one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
  const luminance = (colour) => {
    const [red, green, blue] = rgba(colour).map((one) => linear(one / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = (node) => {
    for (let one = node; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (rgba(colour)[3] > 250) return colour;
    }
    return getComputedStyle(document.body).backgroundColor;
  };
  const texts = "p, td, th, h1, h2, h3, h4, h5, figcaption, li, span, small, code, pre, dd, dt, summary, button, caption";
  for (const node of document.querySelectorAll(texts)) {
    const own = [...node.childNodes].some((child) => child.nodeType === Node.TEXT_NODE && child.data.trim());
    if (!own || node.closest(".visually-hidden, .skip") || !node.getClientRects().length) continue;
    const shades = [luminance(getComputedStyle(node).color), luminance(behind(node))].sort((a, b) => b - a);
    const contrast = (shades[0] + 0.05) / (shades[1] + 0.05);
    if (contrast < 4.5) {
      faults.push(`${contrast.toFixed(2)} : 1 of ${node.tagName}.${node.className}: ${node.textContent.trim().slice(0, 40)}`);
    }
  }
  return faults;
})()
