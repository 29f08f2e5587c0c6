// What is wrong with a page, its links, the ids on it, and how many formulas were rendered
async () => {
  const wrong = [];
  for (const image of document.images) {
    image.loading = 'eager';
    await image.decode().catch(() => {});
    if (!image.naturalWidth) wrong.push('picture: ' + image.src);
    if (!image.alt) wrong.push('picture without words: ' + image.src);
  }
  for (const e of document.querySelectorAll('mjx-merror, [data-mjx-error]')) {
    wrong.push('formula: ' + (e.getAttribute('data-mjx-error') || e.title || e.textContent));
  }
  for (const math of document.querySelectorAll('.math')) {
    if (!math.querySelector('mjx-container')) {
      wrong.push('raw formula: ' + math.textContent.slice(0, 80));
    }
  }
  // raw TeX is looked for in what a reader sees, outside of code
  const code = 'pre, code, script, style, mjx-container, .sig, title';
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT, {
    acceptNode: n => n.parentElement.closest(code) ? NodeFilter.FILTER_REJECT : NodeFilter.FILTER_ACCEPT,
  });
  const commands = 'frac|sum|text|mathrm|operatorname|begin|left|sqrt|cdot|le|in';
  const markup = new RegExp(
    String.raw`\$\$|\\\(|\\\[|\\(${commands})\b|\$[^$\s][^$]*\$|\{py:|^:::|\]\([^)]*\)`, 'm');
  for (let n; n = walk.nextNode();) {
    if (markup.test(n.textContent)) wrong.push('raw markup: ' + n.textContent.trim().slice(0, 80));
  }
  return {
    wrong,
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
    ids: [...document.querySelectorAll('[id]')].map(e => e.id),
    formulas: document.querySelectorAll('mjx-container').length,
  };
}
