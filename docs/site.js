// What is pushed sideways can be reached by the keyboard, and the search has a name.
document$.subscribe(() => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  for (const wide of document.querySelectorAll("pre > code, .md-typeset__scrollwrap"))
    wide.setAttribute("tabindex", "0");
});
